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

  // A normalization that has no axes in the chosen network cannot be chosen with it.
  const allow = () => {
    const network = document.querySelector('input[name="network"]:checked');
    if (!network) return;
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
  drawAll();
})();
