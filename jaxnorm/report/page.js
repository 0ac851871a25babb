"use strict";
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const charts = read("charts");
  const theme = read("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const small = window.matchMedia("(max-width: 560px)");
  const chosen = {};
  const views = {};

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

  const fit = (spec) => {
    // Beside a phone's narrow page a legend of four columns would be cut off.
    const text = JSON.stringify(spec);
    return JSON.parse(small.matches ? text.replaceAll('"columns":4', '"columns":2') : text);
  };

  const draw = async (name) => {
    const place = document.getElementById("chart-" + name);
    if (!place) return;
    const spec = fit(dark.matches ? paint(charts[name]) : charts[name]);
    const { view } = await window.embedChart(place, spec, {
      renderer: "svg",
      actions: false,
      config: config(),
      tooltip: { theme: dark.matches ? "dark" : "light" },
    });
    views[name] = view;
    for (const [signal, value] of Object.entries(chosen)) set(view, signal, value);
    await view.runAsync();
  };

  const set = (view, signal, value) => {
    try {
      view.signal(signal, value);
    } catch {
      return false; // this chart has no such choice
    }
    return true;
  };

  const choose = (signal, value) => {
    chosen[signal] = value;
    for (const view of Object.values(views)) if (set(view, signal, value)) view.runAsync();
  };

  // A normalization that has no axes in the chosen network cannot be chosen with it.
  const allow = () => {
    const network = document.querySelector('input[name="network"]:checked');
    const variants = network.dataset.variants.split(" ");
    for (const input of document.querySelectorAll('input[name="variant"]')) {
      input.disabled = !variants.includes(input.value);
      input.parentElement.title = input.disabled ? "not applicable to this network" : "";
      if (input.disabled && input.checked) {
        const first = document.querySelector('input[name="variant"]');
        first.checked = true;
        choose("variant", first.value);
      }
    }
  };

  const drawAll = () => Promise.all(Object.keys(charts).map(draw));

  for (const input of document.querySelectorAll("[data-signal] input"))
    input.addEventListener("change", () => {
      if (input.name === "network") allow();
      choose(input.name, input.value);
    });
  for (const input of document.querySelectorAll("[data-show] input"))
    input.addEventListener("change", () => {
      for (const panel of document.querySelectorAll(`[data-panel="${input.name}"]`))
        panel.hidden = panel.dataset.name !== input.value;
      window.dispatchEvent(new Event("resize")); // a chart drawn while hidden has no width
    });
  // A page that is reloaded keeps its radio buttons: take what they say, not what the page began with.
  for (const input of document.querySelectorAll("[data-signal] input:checked")) chosen[input.name] = input.value;
  const shown = document.querySelector("[data-show] input:checked");
  if (shown) shown.dispatchEvent(new Event("change"));
  allow();
  dark.addEventListener("change", drawAll);
  small.addEventListener("change", drawAll);
  drawAll();
})();
