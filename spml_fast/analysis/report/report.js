"use strict";
// Puts the page together: the list of sections, maps over pictures, and the table of classes where there is one.
(() => {
  const $ = (id) => document.getElementById(id);
  const { element, shortened, shown } = Shared;

  document.querySelector("nav").append(...[...document.querySelectorAll("section[data-name]")].map((section) =>
    element("a", { href: `#${section.id}` }, section.dataset.name)));

  for (const canvas of document.querySelectorAll("canvas[data-cells]")) {
    Shared.drawCells(canvas, canvas.dataset.cells, canvas.dataset.grid.split(" ").map(Number), true);
  }

  if (!$("class-data")) return;
  const data = JSON.parse($("class-data").textContent);
  for (const group of data.groups) group.label = shown(group.label);
  const figures = makeFigures(data);
  const curves = makeCurves(data, figures);
  let chosen = [];
  const table = makeTable(data, figures, {
    spark: (row) => curves.spark(chosen[0], row),
    show: (row) => curves.draw($("curve"), row, chosen, table ? table.names : data.names.map(shown)),
  });

  function choose() {
    const first = data.groups[Number($("first").value)];
    const second = $("second").value === "" ? null : data.groups[Number($("second").value)];
    chosen = second ? [first, second] : [first];
    table.setSettings(first, second);
    $("about-classes").textContent = sentence(first, second);
  }

  // What the figures of the table are of.
  function sentence(first, second) {
    const parts = [];
    if (first.run) {
      const where = first.predicted ? `of the ${first.split} split` : `of the ${first.split} split, on which the thresholds were chosen`;
      const at = first.thresholds ? "at the threshold of each class" : `at ${first.plain}`;
      parts.push(`Precision and recall ${at}, positives and prevalence are ${where}, of run ${shortened(shown(first.run), 80)}.`);
      if (first.curves) parts.push("The ring on the curve is where that lies; curves have up to 32 points of each class.");
    }
    if (first.deviation) parts.push("AP is the mean over seeds.");
    if (second) parts.push("The difference is the other setting's AP less this one's.");
    return parts.join(" ");
  }

  const option = (group, place) => element("option", { value: place }, shortened(group.label, 60));
  $("first").append(...data.groups.map(option));
  $("second").append(element("option", { value: "" }, "nothing"), ...data.groups.map(option));
  for (const label of document.querySelectorAll(".choice")) label.hidden = data.groups.length < 2;
  if (data.groups.length > 1) $("second").value = String(data.groups.length - 1);
  for (const id of ["first", "second"]) $(id).addEventListener("change", choose);
  $("table").hidden = false;
  choose();
})();
