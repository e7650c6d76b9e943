"use strict";
// What the filters say, and how right the suggestions are that they let pass.

const makeFilters = (data, state, cards) => {
  const $ = (id) => document.getElementById(id);
  const { shown, shortened, number, known, probability, sure, truth, element } = cards;

  // Which rows the filters let pass; what they say is read once.
  function passing() {
    const bound = (id, fallback) => ($(id).value.trim() === "" || Number.isNaN(Number($(id).value)) ? fallback : Number($(id).value));
    const [low, high] = [bound("low", 0), bound("high", 1)];
    const [kind, wanted] = [$("kind").value, $("decision").value];
    const only = $("class").value === "" ? -1 : Number($("class").value);
    return (row) => {
      const p = probability(row);
      if (p < low || p > high || (only >= 0 && only !== data.rows.class[row])) return false;
      if (kind !== "" && (kind === "missing") !== (known(row) === 0)) return false;
      const what = state.get(row);
      return wanted === "open" ? what === "" : wanted === "decided" ? what !== "" : wanted === "" || what === wanted;
    };
  }

  function fillClasses() {
    const counts = new Map();
    for (const id of data.rows.class) counts.set(id, (counts.get(id) || 0) + 1);
    const options = [...counts].sort((a, b) => a[0] - b[0]).map(([id, count]) => {
      const name = shown(data.classes[id]);
      return element("option", { value: id }, `${shortened(name, 60)} (${number(count)})`);
    });
    $("class").replaceChildren(element("option", { value: "" }, `all (${number(counts.size)})`), ...options);
  }

  // Against the labels that training did not see: the list, when it changes, and the decisions, at every one.
  let precision = "";
  function showPrecision(order) {
    if (data.truth === null) return;
    const ranked = [...order].sort((a, b) => sure(b) - sure(a) || a - b);
    const depths = new Set([10, 100, 1000, 10000, 100000, ranked.length]);
    const rows = [];
    let [right, judged] = [0, 0];
    precision = "";
    ranked.forEach((row, place) => {
      right += truth(row) === "1";
      judged += truth(row) !== "?";
      if (!depths.has(place + 1)) return;
      precision = judged ? `${((100 * right) / judged).toFixed(1)}%` : "no truth";
      const values = [number(place + 1), `${number(right)} of ${number(judged)}`, precision];
      rows.push(element("tr", {}, ...values.map((value, k) => element(k ? "td" : "th", k ? {} : { scope: "row" }, value))));
    });
    $("precision").replaceChildren(...rows);
    showAgreement();
  }

  function showAgreement() {
    if (data.truth === null) return;
    let [agreed, decided] = [0, 0];
    for (const [row, [what]] of state.entries) {
      if (what === "skip" || truth(row) === "?") continue;
      decided += 1;
      agreed += (what === "accept") === (truth(row) === "1");
    }
    const yours = decided ? `, you ${number(agreed)} of ${number(decided)}` : "";
    $("truth-line").textContent = precision && `model ${precision} right${yours}`;
  }

  return { passing, fillClasses, showPrecision, showAgreement };
};
