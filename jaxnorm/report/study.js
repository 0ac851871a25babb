"use strict";
(() => {
  const specs = page.read("charts");
  const chosen = {};
  const drawAll = () => {
    for (const [name, spec] of Object.entries(specs)) page.draw(name, { spec, signals: chosen });
  };
  const choose = (signal, value) => {
    chosen[signal] = value;
    drawAll();
  };

  for (const input of document.querySelectorAll("[data-signal] input"))
    input.addEventListener("change", () => choose(input.name, input.value));
  // A page that is reloaded keeps its radio buttons: take what they say, not what the page began with.
  for (const input of document.querySelectorAll("[data-signal] input:checked")) chosen[input.name] = input.value;
  drawAll();
})();
