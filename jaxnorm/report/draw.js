"use strict";
// What all sections share: specifications become charts in the page's colours.
const page = (() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const theme = read("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const small = window.matchMedia("(max-width: 560px)");
  const charts = new Map(); // by the id of its element

  // The specifications hold a light page's colours; in the dark each has a counterpart.
  const paint = (value) => {
    if (typeof value === "string") return theme[value] ?? value;
    if (Array.isArray(value)) return value.map(paint);
    if (value && typeof value === "object")
      return Object.fromEntries(
        Object.entries(value).map(([key, item]) => [key, key === "datasets" || key === "values" ? item : paint(item)]));
    return value;
  };

  const config = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, soft, line] = ["--ink", "--soft", "--line"].map((name) => style.getPropertyValue(name).trim());
    const font = getComputedStyle(document.body).fontFamily;
    return {
      background: "transparent",
      font,
      view: { stroke: null },
      title: { color: ink },
      axis: {
        labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, titlePadding: 8,
      },
      legend: {
        labelColor: ink, titleColor: soft, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500,
        columns: small.matches ? 2 : 4, labelLimit: 220,
      },
    };
  };

  // On a phone's narrow page wide legends would be cut off, and long names leave no room for what
  // they are the names of.
  const fit = (key, value) => {
    if (!small.matches || typeof value !== "number") return value;
    return { columns: 2, labelLimit: 110, tickCount: 4, gradientLength: 170 }[key] ?? value;
  };

  const set = (view, signal, value) => {
    try {
      view.signal(signal, value);
    } catch {
      // this chart has no such choice
    }
  };

  const embed = async (chart, wanted) => {
    const spec = JSON.parse(JSON.stringify(dark.matches ? paint(wanted.spec) : wanted.spec), fit);
    const { view } = await window.embedChart(chart.element, { ...spec, datasets: { ...spec.datasets, ...wanted.data } }, {
      renderer: "svg",
      actions: false,
      config: config(),
      tooltip: { theme: dark.matches ? "dark" : "light" },
    });
    if (wanted.clicked)
      view.addEventListener("click", (event, item) => item?.datum && wanted.clicked(item.datum));
    return view;
  };

  // One thing after the other: a slider asks for more than can be drawn, and only the last counts.
  const work = async (chart) => {
    if (chart.busy) return;
    chart.busy = true;
    while (chart.wanted) {
      const wanted = chart.wanted;
      const key = `${wanted.key} ${dark.matches} ${small.matches}`;
      chart.wanted = null;
      if (chart.key === key) {
        const changed = Object.entries(wanted.data).filter(([name, rows]) => rows !== chart.given[name]);
        for (const [name, rows] of changed) chart.view.data(name, rows);
        if (changed.some(([name]) => name !== "now")) chart.view.resize(); // the labels may be longer
      } else {
        chart.view?.finalize();
        chart.view = await embed(chart, wanted);
        chart.key = key;
      }
      chart.given = { ...wanted.data };
      for (const [signal, value] of Object.entries(wanted.signals)) set(chart.view, signal, value);
      await chart.view.runAsync();
    }
    chart.busy = false;
    chart.element.dataset.drawn = Number(chart.element.dataset.drawn ?? 0) + 1;
  };

  // Draws a chart; one that is there with the same key is only given its data and choices.
  const draw = (id, wanted) => {
    const element = document.getElementById(`chart-${id}`);
    if (!element) return;
    if (charts.get(id)?.element !== element) charts.set(id, { element });
    const chart = charts.get(id);
    chart.wanted = chart.last = { key: id, data: {}, signals: {}, ...wanted };
    return work(chart);
  };

  // Gives charts other data, as far as they show such data, and leaves the rest of them alone.
  const change = (data) => {
    for (const chart of charts.values()) {
      const given = Object.entries(data).filter(([name]) => name in chart.last.data);
      if (!given.length) continue;
      chart.wanted = chart.last = { ...chart.last, data: { ...chart.last.data, ...Object.fromEntries(given) } };
      work(chart);
    }
  };

  const again = () => {
    for (const chart of charts.values()) {
      chart.wanted = chart.last;
      work(chart);
    }
  };
  dark.addEventListener("change", again);
  small.addEventListener("change", again);
  const working = () => [...charts.values()].some((chart) => chart.busy);
  const shown = (id, name) => charts.get(id).view.data(name);
  return { read, draw, change, working, shown };
})();
