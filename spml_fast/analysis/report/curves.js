"use strict";
// Precision-recall curves: small ones in the rows, and the large one of the class that is looked at.
const makeCurves = (data, figures) => {
  const { element, shortened, number } = Shared;
  const SPACE = "http://www.w3.org/2000/svg";
  const svg = (tag, attributes, ...children) => {
    const made = document.createElementNS(SPACE, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  };

  // Points of a class, [recall, precision] from 0 to 1, from the highest score down.
  const decoded = new Map();
  function points(group, row) {
    if (!group || !group.curves) return [];
    if (!decoded.has(group)) {
      const raw = atob(group.curves.data);
      const starts = [0];
      for (const count of group.curves.points) starts.push(starts[starts.length - 1] + count);
      decoded.set(group, { raw, starts });
    }
    const { raw, starts } = decoded.get(group);
    const found = [];
    for (let k = starts[row]; k < starts[row + 1]; k += 1) found.push([raw.charCodeAt(2 * k) / 255, raw.charCodeAt(2 * k + 1) / 255]);
    return found;
  }

  function path(found, x, y) {
    if (!found.length) return "";
    const parts = found.map(([recall, precision], k) => `${k ? "L" : "M"}${x(recall).toFixed(1)} ${y(precision).toFixed(1)}`);
    // From the first point to the left edge: precision before the first positive is not defined, so it is level.
    return `M${x(0).toFixed(1)} ${y(found[0][1]).toFixed(1)}L${parts.join("").slice(1)}`;
  }

  const WIDE = 64;
  const HIGH = 24;
  function spark(group, row) {
    const line = svg("path", { d: path(points(group, row), (v) => 1 + v * (WIDE - 2), (v) => HIGH - 1 - v * (HIGH - 2)) });
    return svg("svg", { class: `spark ${group.colour}`, width: WIDE, height: HIGH, "aria-hidden": "true" }, svg("rect", { width: WIDE, height: HIGH, rx: 3 }), line);
  }

  const LEFT = 44;
  const TOP = 8;
  const SIDE = 226;
  const x = (v) => LEFT + v * SIDE;
  const y = (v) => TOP + (1 - v) * SIDE;

  // The curves of one class of the settings, with a mark where the thresholds are.
  function draw(place, row, groups, names) {
    const name = names[row];
    const parts = [];
    for (const v of [0, 0.25, 0.5, 0.75, 1]) {
      parts.push(svg("path", { class: "grid", d: `M${x(0)} ${y(v)}H${x(1)}M${x(v)} ${y(0)}V${y(1)}` }));
      parts.push(svg("text", { class: "end", x: LEFT - 5, y: y(v) + 4 }, String(v)), svg("text", { class: "mid", x: x(v), y: y(0) + 15 }, String(v)));
    }
    parts.push(svg("text", { class: "mid", x: x(0.5), y: y(0) + 30 }, "recall"));
    parts.push(svg("text", { class: "mid", transform: `translate(9 ${y(0.5)}) rotate(-90)` }, "precision"));
    groups.forEach((group, k) => {
      const line = path(points(group, row), x, y);
      if (line) parts.push(svg("path", { class: `line ${group.colour}`, "stroke-width": 2, ...(k ? { "stroke-dasharray": "6 4" } : {}), d: line }));
      const precision = figures.precision(group, row);
      const recall = figures.recall(group, row);
      if (group.curves && precision !== null && recall !== null) {
        parts.push(svg("circle", { class: `mark ${group.colour}`, cx: x(recall / 100), cy: y(precision / 100), r: 5 }));
      }
    });
    const drawing = svg("svg", { class: "chart", viewBox: `0 0 ${LEFT + SIDE + 10} ${TOP + SIDE + 36}`, role: "img" }, svg("title", {}, `precision-recall curve of ${name}`), ...parts);
    const facts = [];
    const say = (label, value) => facts.push(element("dt", {}, label), element("dd", {}, value));
    for (const group of groups) {
      if (groups.length > 1) facts.push(element("dt", { class: `strong ${group.colour}` }, shortened(group.label, 40)), element("dd", {}));
      const ap = figures.ap(group, row);
      const spread = figures.deviation(group, row);
      if (ap !== null) say("AP", `${ap.toFixed(2)}%${spread === null ? "" : ` ± ${spread.toFixed(2)}`}`);
      const threshold = figures.threshold(group, row);
      if (threshold !== null) say(group.pooled.includes(row) ? "threshold (of all classes)" : "threshold", thresholdText(threshold));
      for (const which of ["precision", "recall"]) {
        const value = figures[which](group, row);
        if (value !== null) say(which, `${value.toFixed(1)}%`);
      }
      if (group.predicted) say("correct predictions", `${number(group.hits[row])} of ${number(group.predicted[row])}`);
      const prevalence = figures.prevalence(group, row);
      if (prevalence !== null) say("prevalence", `${prevalence.toFixed(2)}%`);
      if (group.positives) say("positives, negatives known", `${number(group.positives[row])}, ${number(group.negatives[row])}`);
    }
    const heading = element("h3", {}, element("bdi", { title: shortened(name, 400) }, shortened(name, 80)));
    const none = groups.some((group) => points(group, row).length) ? [drawing] : [];
    place.replaceChildren(heading, ...none, element("dl", {}, ...facts));
  }

  return { spark, draw, points };
};
