"use strict";
(async () => {
  const { runs, kinds, edges, measures } = page.read("runs");
  const specs = page.read("run-charts");
  const $ = (id) => document.getElementById(id);
  const checked = (name) => Number(document.querySelector(`input[name="${name}"]:checked`)?.value ?? 0);

  // The inverse of jaxnorm/report/pack.py.
  const WAYS = [(a) => a, (a) => 10 ** a, (a) => a * a, (a) => 0.1 * Math.sinh(a)];
  const SPECIAL = { 252: 0, 253: -Infinity, 254: Infinity, 255: NaN };
  const inflate = async (text) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };
  const numbers = (run, [start, low, high, mode], from, count) =>
    Array.from(run.bytes.subarray(start + from, start + from + count), (code) =>
      code <= 250 ? WAYS[mode](low + (code / 250) * (high - low)) : SPECIAL[code]);
  const series = (run, at, which = 0) => numbers(run, at, which * run.steps.length, run.steps.length);

  const drawable = (value) => (Number.isFinite(value) ? value : null);
  const said = (value) =>
    Number.isNaN(value) ? "not a number" : Number.isFinite(value) ? String(Number(value.toPrecision(3))) : value > 0 ? "infinite" : "minus infinite";
  const inOrder = new Intl.Collator("en", { numeric: true }); // layer 2 comes before layer 10
  const called = (place) => `${place.layer}, ${place.side}`;
  // A cell reaches to the next step that is shown, and the last is as wide as the one before it.
  const cells = (row, at, steps, values, gap) =>
    at.flatMap((i, k) => {
      if (gap(values[i], i)) return [];
      const end = steps[at[k + 1]] ?? steps[i] + (steps[i] - steps[at[k - 1]] || 1);
      return [{ ...row, step: steps[i], end, value: drawable(values[i]), said: said(values[i]) }];
    });
  // At most `most` of `count` indices, evenly spaced, with the first and the last.
  const some = (count, most) =>
    [...new Set(Array.from({ length: Math.min(count, most) }, (_, i) => Math.round((i * (count - 1)) / Math.max(1, Math.min(count, most) - 1))))];
  // Each row begins with a cell of no width: so all have their place, in their order, whatever is in
  // them, and no chart is without any data.
  const parts = (field, names, shown) => {
    const [first] = run().steps;
    const none = names.map((name) => ({ [field]: name, step: first, end: first, value: 0 }));
    return {
      cells: [...none, ...shown.filter((cell) => cell.value !== null)],
      broken: [none[0], ...shown.filter((cell) => cell.value === null)],
      now: now(),
    };
  };
  // So many cells can be drawn while somebody waits.
  const columns = (count, rows) => some(count, Math.max(20, Math.floor(8000 / rows)));
  // Very many rows become thin, and few do not become tall.
  const tall = (rows) => rows * Math.max(4, Math.min(26, 560 / rows));

  const state = { run: 0, place: 0, frame: 0 };
  const run = () => runs[state.run];
  const step = () => run().steps[run().frames[state.frame]];
  const now = () => (run().steps.length ? [{ step: step() }] : []);

  // Shows charts, or says why there is nothing to show.
  const either = (name, ids, why) => {
    for (const id of ids) $(`chart-${id}`).hidden = Boolean(why);
    $(`empty-${name}`).hidden = !why;
    $(`empty-${name}`).textContent = why;
    return !why;
  };
  const lacking = () => (run().steps.length ? "" : `${run().name} has no samples yet.`);

  const table = (details, heads, rows) => {
    if (!details.open) return;
    const line = (parts, tag) => {
      const row = document.createElement("tr");
      parts.forEach((part, i) => {
        const cell = document.createElement(i && tag === "td" ? "td" : "th");
        cell.scope = tag === "td" ? "row" : "col";
        cell.textContent = part;
        row.append(cell);
      });
      return row;
    };
    const filled = document.createElement("table");
    filled.createTHead().append(line(heads, "th"));
    filled.createTBody().append(...rows().map((row) => line(row, "td")));
    details.querySelector(".scroll").replaceChildren(filled);
  };
  const options = (select, texts, chosen) => {
    select.replaceChildren(...texts.map(([value, text]) => new Option(text, value, false, value === chosen)));
    select.value = chosen;
  };

  const drawHeatmap = () => {
    const name = $("measure").value;
    const kind = document.querySelector('input[name="kind"]:checked')?.value;
    const words = measures[name];
    const found = run().measures[name] ?? {};
    const rows = run().places.flatMap((place, i) => (place.kind === kind && found[i] ? [[place, i]] : []));
    if (words)
      for (const part of ["good", "bad", "definition"]) $(`measure-${part}`).textContent = words[part];
    const none = `${run().name} has no ${words?.label ?? "measure"} of what goes ${kinds[kind] ?? "anywhere"}.`;
    const at = columns(run().steps.length, rows.length);
    const values = new Map(rows.map(([, i]) => [i, series(run(), found[i])]));
    const shown = rows.flatMap(([place, i]) =>
      cells({ layer: place.layer, place: i }, at, run().steps, values.get(i), (value, first) => words.compares && !first && Number.isNaN(value)));
    const single = `There is one sample of ${run().name}, and nothing to compare it with.`;
    $("table-heatmap").hidden = !shown.length;
    if (!either("heatmap", ["heatmap"], lacking() || (!rows.length ? none : shown.length ? "" : single))) return;
    page.draw("heatmap", {
      key: `${name} ${rows.length}`,
      spec: { ...specs[`heatmap-${name}`], height: tall(rows.length) },
      data: parts("layer", rows.map(([place]) => place.layer), shown),
      clicked: choose,
    });
    $("chart-heatmap").ariaLabel = `Heatmap: ${words.label} of ${run().name}, ${kinds[kind]}, ${rows.length} layers by ${run().steps.length} steps`;
    const few = some(run().steps.length, 6);
    table($("table-heatmap"), ["layer", ...few.map((i) => `step ${run().steps[i]}`)], () =>
      rows.map(([place, i]) => [place.layer, ...few.map((k) => said(values.get(i)[k]))]));
  };

  const drawHistogram = () => {
    const at = run().histograms[state.place];
    const bins = edges.length + 1;
    const counts = run().frames.map((_, frame) => numbers(run(), at, frame * bins, bins));
    // The outer bins have no end; they are drawn a step wider than the ones beside them.
    const last = edges.at(-1) ** 2 / edges.at(-2);
    const ends = [-last, ...edges, last];
    const used = counts[0].map((_, bin) => counts.some((row) => row[bin] > row.reduce((a, b) => a + b) / 200));
    const [from, to] = [used.indexOf(true), used.lastIndexOf(true) + 1];
    // The bins beside zero are too narrow to be seen: some make a bar together, but none across zero.
    const bars = [];
    for (let bin = Math.max(from, 0); bin < to; bin++) {
      const bar = bars.at(-1);
      const narrow = bar && ends[bar.bins.at(-1) + 1] - ends[bar.bins[0]] < (ends[to] - ends[from]) / 48;
      if (narrow && bin !== bins / 2) bar.bins.push(bin);
      else bars.push({ bins: [bin] });
    }
    // Heights are per unit of width. A heap of zeros, as a ReLU makes it, would leave nothing to be
    // seen of the rest: its bar is cut off.
    const count = (bar, frame) => bar.bins.reduce((sum, bin) => sum + counts[frame][bin], 0);
    for (const bar of bars) {
      [bar.start, bar.end] = [ends[bar.bins[0]], ends[bar.bins.at(-1) + 1]];
      bar.height = count(bar, state.frame) / (bar.end - bar.start);
      bar.count = Math.round(count(bar, state.frame));
      bar.top = Math.max(...counts.map((_, frame) => count(bar, frame))) / (bar.end - bar.start);
    }
    const others = bars.filter((bar) => bar.start !== 0).map((bar) => bar.top);
    const highest = Math.max(0, ...others) || bars[0]?.top;
    for (const bar of bars) Object.assign(bar, { highest, height: Math.min(bar.height, 1.05 * highest) });
    if (!either("histogram", ["histogram"], bars.length ? "" : "No finite number was counted at any step.")) return;
    page.draw("histogram", { spec: specs.histogram, data: { bars } });
    $("chart-histogram").ariaLabel = `Histogram of ${called(run().places[state.place])} at step ${step()}`;
  };

  const drawDistribution = () => {
    const at = run().bands[state.place];
    const why = lacking() || (at ? "" : `${run().name} has nothing that was observed.`);
    $("pair-distribution").hidden = why;
    if (!either("distribution", [], why)) return;
    drawHistogram();
    const [low, middle, high] = [0, 1, 2].map((which) => series(run(), at, which).map(drawable));
    if (!either("band", ["band"], middle.some((value) => value !== null) ? "" : "No finite number was counted at any step.")) return;
    const lines = run().steps.map((step, i) => ({ step, low: low[i], middle: middle[i], high: high[i] }));
    page.draw("band", { spec: specs.band, data: { lines, now: now() } });
  };

  // Layers of parameters and places have names of their own: the nearest is the one that shares most
  // of its path, and of those the one of the same number.
  const nearest = (layers, path) => {
    const shared = (layer) => {
      const [a, b] = [layer.split("/"), path.split("/")];
      const differing = a.findIndex((part, i) => part !== b[i]);
      const [number, other] = [layer, path].map((name) => /\d*$/.exec(name)[0]);
      return 2 * (differing < 0 ? a.length : differing) + (number === other);
    };
    return layers.reduce((best, layer, i) => (shared(layer) > shared(layers[best]) ? i : best), 0);
  };

  const PANELS = ["mean_drift", "variance_ratio", "kl_divergence", "l2", "cosine", "loss"];
  const drawAgreement = () => {
    const { shift } = run();
    $("shift-field").hidden = !shift;
    $("no-shift").hidden = Boolean(shift) || !run().steps.length;
    const layer = Number($("shift").value);
    const at = {
      l2: shift?.l2[layer], cosine: shift?.cosine[layer], loss: run().metrics.loss,
      ...Object.fromEntries(PANELS.slice(0, 3).map((name) => [name, run().measures[name]?.[state.place]])),
    };
    const values = Object.fromEntries(PANELS.filter((name) => at[name]).map((name) => [name, series(run(), at[name])]));
    // Of a zero there is no logarithm; the axis ends where the numbers do.
    const log = (name) => specs[`panel-${name}`].layer[0].encoding.y.scale.type === "log";
    const points = (name) => values[name].map((value) => (log(name) && value <= 0 ? null : drawable(value)));
    const here = PANELS.filter((name) => values[name]);
    const bare = here.filter((name) => points(name).every((value) => value === null));
    $("table-agreement").hidden = !here.length;
    const title = (name) => specs[`panel-${name}`].title.text;
    const words = bare.map(title).join("; ");
    either("agreement", [], lacking() || (words && `Nothing to draw in any sample: ${words}.`));
    for (const name of PANELS) $(`chart-panel-${name}`).hidden = !values[name] || bare.includes(name);
    for (const name of here) {
      if (bare.includes(name)) continue;
      const lines = points(name).map((value, i) => ({ step: run().steps[i], value }));
      page.draw(`panel-${name}`, { spec: specs[`panel-${name}`], data: { lines, now: now() } });
    }
    table($("table-agreement"), ["step", ...here.map(title)], () =>
      some(run().steps.length, 20).map((i) => [run().steps[i], ...here.map((name) => said(values[name][i]))]));
  };

  const drawChannels = () => {
    const norm = run().channels[$("norm").value];
    $("norm-field").hidden = $("caption-channels").hidden = !norm;
    const none = `${run().name} has no batch normalization whose running statistics were observed.`;
    if (!either("channels", ["channels"], lacking() || (norm ? "" : none))) return;
    const steps = run().frames.map((i) => run().steps[i]);
    const at = columns(steps.length, norm.rows.length);
    const shown = norm.rows.flatMap((channel, i) =>
      cells({ channel }, at, steps, numbers(run(), norm.at, i * steps.length, steps.length), () => false));
    page.draw("channels", {
      key: `channels ${norm.rows.length}`,
      spec: { ...specs.channels, height: tall(norm.rows.length) },
      data: parts("channel", norm.rows, shown),
      clicked: choose,
    });
  };

  const drawLearning = () => {
    const names = [...new Set(alike().flatMap((i) => Object.keys(runs[i].metrics)))];
    const places = $("metrics");
    if (places.dataset.names !== JSON.stringify(names)) {
      places.dataset.names = JSON.stringify(names);
      places.replaceChildren(...names.map((name, i) => {
        const figure = document.createElement("figure");
        figure.append(document.createElement("h3"), document.createElement("div"));
        figure.firstChild.textContent = name;
        Object.assign(figure.lastChild, { className: "chart", id: `chart-metric-${i}`, role: "img", ariaLabel: `${name} by step` });
        return figure;
      }));
    }
    places.hidden = lacking();
    if (!either("metrics", [], lacking())) return either("updates", ["updates"], lacking());
    names.forEach((name, i) => {
      const lines = alike().filter((i) => runs[i].metrics[name]).flatMap((i) =>
        series(runs[i], runs[i].metrics[name]).map((value, at) => ({ run: runs[i].name, step: runs[i].steps[at], value: drawable(value) })));
      const bare = lines.every((point) => point.value === null);
      places.children[i].hidden = bare;
      if (bare) either("metrics", [], "What is not shown was never finite.");
      else page.draw(`metric-${i}`, { key: places.dataset.names, spec: specs.metric, data: { lines, now: now() } });
    });
    const updates = Object.entries(run().updates).sort(([a], [b]) => inOrder.compare(a, b));
    const at = columns(run().steps.length, updates.length);
    const shown = updates.flatMap(([parameter, packed]) =>
      cells({ parameter }, at, run().steps, series(run(), packed), (value) => Math.abs(value) === Infinity));
    if (!either("updates", ["updates"], shown.length ? "" : `${run().name} has no parameters that are not zero.`)) return;
    page.draw("updates", {
      key: `updates ${updates.length}`,
      spec: { ...specs.updates, height: tall(updates.length) },
      data: parts("parameter", updates.map(([name]) => name), shown),
      clicked: choose,
    });
  };

  // Those that the chosen run is compared with.
  const alike = () => runs.flatMap((each, i) => (each.group === run().group ? [i] : []));

  const drawPlace = () => {
    drawDistribution();
    drawAgreement();
    drawChannels();
  };
  const drawStep = () => {
    page.change({ now: now() });
    if (run().histograms[state.place]) drawHistogram();
  };
  const drawAll = () => {
    drawHeatmap();
    drawPlace();
    drawLearning();
  };

  const pickPlace = (place) => {
    state.place = Math.max(0, Math.min(place, run().places.length - 1));
    $("place").value = String(state.place);
    const chosen = run().places[state.place];
    for (const text of document.querySelectorAll(".chosen")) text.textContent = chosen ? `${run().name}: ${called(chosen)}` : "";
    if (chosen && run().shift) $("shift").value = String(nearest(run().shift.layers, chosen.layer));
    if (state.place in run().channels) $("norm").value = String(state.place);
  };
  const pickFrame = (frame) => {
    state.frame = Math.max(0, Math.min(frame, run().frames.length - 1));
    $("step").value = String(state.frame);
    $("step-now").textContent = run().steps.length ? step() : "";
    $("step").setAttribute("aria-valuetext", `step ${$("step-now").textContent}`);
  };
  // The same layer and the same step in the next run, as far as it has them.
  const pickRun = (index) => {
    const [before, at] = [run().places[state.place], run().steps.length ? step() : 0];
    const first = index === null;
    state.run = index ?? 0;
    document.querySelectorAll('input[name="run"]')[state.run].checked = true;
    const places = run().places;
    options($("place"), places.map((place, i) => [String(i), called(place)]), "0");
    $("place").disabled = !places.length;
    options($("norm"), Object.keys(run().channels).map((i) => [i, places[i].layer]), Object.keys(run().channels)[0]);
    options($("shift"), (run().shift?.layers ?? []).map((layer, i) => [String(i), layer || "(the model itself)"]), "0");
    $("step").max = String(Math.max(0, run().frames.length - 1));
    const stops = run().frames.map((i) => Math.abs(run().steps[i] - at));
    pickFrame(first ? run().frames.length - 1 : stops.indexOf(Math.min(...stops)));
    const same = places.findIndex((place) => before && called(place) === called(before));
    // The deepest layer is where the most has come together, and has a gradient-based shift.
    const deepest = places.findLastIndex((place) => place.kind === "nonlinearity-input");
    pickPlace(first || same < 0 ? Math.max(0, deepest) : same);
    drawAll();
  };
  const choose = (datum) => {
    const stops = run().frames.map((i) => Math.abs(run().steps[i] - datum.step));
    pickFrame(stops.indexOf(Math.min(...stops)));
    if (datum.place !== undefined) {
      pickPlace(datum.place);
      drawPlace();
    }
    drawStep();
  };
  const showGroup = (group) => {
    for (const label of document.querySelectorAll("[data-group]")) label.hidden = Number(label.dataset.group) !== group;
  };

  // What a browser that cannot inflate leaves on the page is all that needs no charts.
  if (!window.DecompressionStream) {
    $("bar").textContent = "The charts need a browser of 2023 or later.";
    return;
  }
  for (const each of runs) each.bytes = await inflate(each.numbers);
  // To begin with, what can be compared in all runs that have anything.
  const has = (each, kind) => each.places.some((place) => place.kind === kind);
  const present = Object.keys(kinds).filter((kind) => runs.some((each) => has(each, kind)));
  const common = present.filter((kind) => runs.every((each) => !each.places.length || has(each, kind)));
  const first = common.includes("nonlinearity-input") ? "nonlinearity-input" : (common[0] ?? present[0]);
  for (const input of document.querySelectorAll('input[name="kind"]')) {
    input.parentElement.hidden = !present.includes(input.value);
    input.checked = input.value === first;
    input.addEventListener("change", drawHeatmap);
  }
  // The spread of a channel says more than the spread of a layer. It is there if channels were observed.
  const known = (each, name) => each.places.some((place, i) => place.kind === first && each.measures[name]?.[i]);
  const measure = ["spread", "deviation"].find((name) => runs.every((each) => !each.places.length || known(each, name)));
  if (measure) $("measure").value = measure;
  $("measure").addEventListener("change", drawHeatmap);
  $("table-heatmap").addEventListener("toggle", drawHeatmap);
  $("table-agreement").addEventListener("toggle", drawAgreement);
  $("place").addEventListener("change", () => (pickPlace(Number($("place").value)), drawPlace()));
  $("norm").addEventListener("change", drawChannels);
  $("shift").addEventListener("change", drawAgreement);
  $("step").addEventListener("input", () => (pickFrame(Number($("step").value)), drawStep()));
  for (const input of document.querySelectorAll('input[name="run"]'))
    input.addEventListener("change", () => pickRun(Number(input.value)));
  for (const input of document.querySelectorAll('input[name="group"]'))
    input.addEventListener("change", () => {
      showGroup(Number(input.value));
      const members = [...document.querySelectorAll(`[data-group="${input.value}"] input`)].map((each) => Number(each.value));
      pickRun(members.find((i) => runs[i].name === run().name) ?? members[0]);
    });
  showGroup(checked("group"));
  pickRun(null);
})();
