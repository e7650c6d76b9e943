"use strict";
// Shows the suggestions of a page as cards, of which only those in view are part of the document, and takes decisions.

(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const total = data.rows.image.length;
  const served = document.querySelector('meta[name="autosave"]').content === "on";
  const store = served
    ? new Review.ServerStore("decisions", () => showCounts())
    : new Review.LocalStore(`spml_fast review ${data.run} ${data.id} `, storage());
  const state = new Review.State(total, store);
  const list = $("list");
  const space = $("space");
  const wide = matchMedia("(min-width: 60rem)");
  const GAP = 12;
  const HEAD = 46;
  // Rows that pass the filters, in order; the lines of cards and headings they make; the cards that are there.
  let order = [];
  let lines = [];
  let offsets = [0];
  let columns = 1;
  let cardHeight = 0;
  let current = 0;
  let mounted = new Map();
  let sinceFilter = 0;
  let width = 0;
  // While the list flies past, cards come without their pictures, which follow when it slows down.
  let rushing = false;
  let lastTop = 0;
  let settled = 0;

  function storage() {
    try {
      return window.localStorage;
    } catch (error) {
      return null;
    }
  }

  // Characters that would turn the text about or that nobody sees are spelled out.
  const shown = (text) =>
    text.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g,
      (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  const shortened = (text, most) =>
    text.length <= most ? text : text.slice(0, Math.ceil(most / 2) - 1) + "…" + text.slice(text.length - Math.floor(most / 2));
  const number = (value) => value.toLocaleString("en");
  const className = (row) => shown(data.classes[data.rows.class[row]]);
  const image = (row) => data.images[data.rows.image[row]];
  const known = (row) => data.rows.known[row];
  const probabilities = Float64Array.from(data.rows.probability, Number);
  const probability = (row) => probabilities[row];
  const sure = (row) => Review.sureness(known(row), probability(row));
  const adds = (row) => Review.suggestionOf(known(row)) === "positive";
  const truth = (row) => (data.truth === null ? "?" : data.truth[row]);

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") made.className = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  // The map's cells as colours; the browser stretches them over the picture.
  const COLOURS = [[199, 13, 33], [13, 71, 191]];
  function drawMap(canvas, row) {
    const text = data.rows.map[row];
    const choice = $("map").value;
    canvas.hidden = text === "" || choice === "off";
    if (canvas.hidden) return;
    const [height, width] = data.grid;
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    const raw = atob(text);
    for (let k = 0; k < width * height; k += 1) {
      const cell = (raw.charCodeAt(k) << 24) >> 24;
      const value = choice === "for" ? Math.max(0, cell) : cell;
      // Lifted, so that weak evidence is visible too.
      const alpha = 0.72 * Math.abs(value / 127) ** 0.7;
      pixels.data.set([...COLOURS[value < 0 ? 1 : 0], Math.round(255 * alpha)], 4 * k);
    }
    context.putImageData(pixels, 0, 0);
  }

  const KEYS = { accept: "A", reject: "R", skip: "S" };
  const WORDS = { accept: "Accept", reject: "Reject", skip: "Skip" };
  const DONE = { accept: "accepted", reject: "rejected", skip: "skipped" };

  function decisionButtons(row) {
    return Object.keys(WORDS).map((what) => {
      const button = element("button", { type: "button", class: what, "data-what": what }, WORDS[what], element("kbd", {}, KEYS[what]));
      button.addEventListener("click", (event) => {
        event.stopPropagation();
        // The button of a decision takes it back.
        decide(row, state.get(row) === what ? "" : what);
      });
      return button;
    });
  }

  function picture(row) {
    const made = element("img", { alt: "", decoding: "async", draggable: "false" });
    const found = image(row);
    if (found.src) made.src = found.src;
    if (found.width < 160) made.className = "small";
    return made;
  }

  // The image, and again with the map over it.
  function addPictures(views, row) {
    const [plain, mapped] = views.children;
    plain.append(picture(row));
    if (!mapped) return;
    const canvas = element("canvas", { "aria-hidden": "true" });
    drawMap(canvas, row);
    mapped.append(picture(row), canvas);
  }

  function card(place) {
    const row = order[place];
    const found = image(row);
    const name = className(row);
    const verb = adds(row) ? "add" : "remove";
    const views = element("div", { class: "pair" }, element("figure"));
    if (data.grid !== null) views.append(element("figure"));
    if (!found.src) views.replaceChildren(element("p", { class: "muted" }, "the image cannot be read"));
    else if (rushing) views.dataset.row = row;
    else addPictures(views, row);
    const ratio = found.width / found.height;
    for (const figure of views.querySelectorAll("figure")) figure.style.aspectRatio = String(ratio);
    for (const figure of views.querySelectorAll("figure")) figure.classList.toggle("tall", ratio < 1);
    const made = element(
      "article",
      { tabindex: place === current ? "0" : "-1", "aria-posinset": place + 1, "aria-setsize": order.length, "data-place": place },
      views,
      element("p", { class: "claim" }, element("span", { class: `verb ${verb}` }, verb), element("bdi", { title: shortened(name, 400) }, shortened(name, 80)),
        element("span", { class: "probability", title: "probability of the class" }, probability(row).toFixed(3))),
      element("p", { class: "path" }, element("bdi", { title: shortened(shown(found.path), 400) }, shortened(shown(found.path), 60)),
        element("span", { class: "truth" })),
      element("div", { class: "buttons" }, ...decisionButtons(row)),
    );
    made.addEventListener("click", () => {
      select(place, false);
    });
    views.addEventListener("click", () => openDetails(place));
    mark(made, row);
    return made;
  }

  const TRUTH = { 1: "right", 0: "wrong", "?": "not known" };
  function mark(made, row) {
    const what = state.get(row);
    made.dataset.decision = what;
    for (const button of made.querySelectorAll("[data-what]")) {
      button.setAttribute("aria-pressed", String(button.dataset.what === what));
    }
    const label = `${adds(row) ? "add" : "remove"} ${className(row)}, probability ${probability(row).toFixed(3)}, ${image(row).path}, ${DONE[what] || "undecided"}`;
    made.setAttribute("aria-label", shown(label));
    const place = made.querySelector(".truth");
    if (place) place.textContent = data.truth !== null && $("reveal").checked ? `suggestion ${TRUTH[truth(row)]}` : "";
  }

  function heading(line) {
    let done = 0;
    for (let k = line.start; k < line.start + line.count; k += 1) done += state.get(order[k]) !== "";
    const name = className(order[line.start]);
    return element("h2", {}, element("bdi", { title: shortened(name, 400) }, shortened(name, 80)),
      element("span", { class: "muted" }, `${number(line.count)} suggested, ${number(done)} decided`));
  }

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

  function filter(keep) {
    const kept = order[current];
    const sign = $("order").value === "unsure" ? -1 : 1;
    const grouped = $("order").value === "class";
    order = [];
    const passes = passing();
    for (let row = 0; row < total; row += 1) if (passes(row)) order.push(row);
    order.sort((a, b) => (grouped ? data.rows.class[a] - data.rows.class[b] : 0) || sign * (sure(b) - sure(a)) || a - b);
    current = keep === true ? Math.max(0, order.indexOf(kept)) : 0;
    sinceFilter = 0;
    layout();
    list.scrollTop = 0;
    if (current > 0) reveal(current);
    showCounts();
    showPrecision();
  }

  function layout() {
    const style = getComputedStyle(list);
    width = list.clientWidth;
    const room = width - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
    columns = Math.max(1, Math.floor((room + GAP) / (340 + GAP)));
    const cardWidth = (room - (columns - 1) * GAP) / columns;
    // Two squares beside each other, two lines of text, buttons, and what is between them.
    cardHeight = Math.round((cardWidth - 34) / 2 + (wide.matches ? 124 : 130));
    space.style.setProperty("--card-height", `${cardHeight}px`);
    space.style.setProperty("--columns", columns);
    lines = [];
    offsets = [0];
    const grouped = $("order").value === "class";
    for (let start = 0; start < order.length; ) {
      let end = order.length;
      if (grouped) {
        const id = data.rows.class[order[start]];
        end = start;
        while (end < order.length && data.rows.class[order[end]] === id) end += 1;
        push({ head: true, start, count: end - start }, HEAD);
      }
      for (; start < end; start += columns) push({ head: false, start, count: Math.min(columns, end - start) }, cardHeight + GAP);
      start = end;
    }
    space.style.height = `${offsets[offsets.length - 1]}px`;
    $("empty").hidden = order.length > 0;
    const focused = space.contains(document.activeElement);
    space.replaceChildren();
    mounted = new Map();
    render();
    if (focused && cardAt(current)) cardAt(current).focus({ preventScroll: true });
  }

  function push(line, height) {
    lines.push(line);
    offsets.push(offsets[offsets.length - 1] + height);
  }

  // The last line that begins at or above y.
  function lineAt(y) {
    let [from, to] = [0, lines.length - 1];
    while (from < to) {
      const middle = (from + to + 1) >> 1;
      if (offsets[middle] <= y) from = middle;
      else to = middle - 1;
    }
    return from;
  }

  function lineOf(place) {
    let [from, to] = [0, lines.length - 1];
    while (from < to) {
      const middle = (from + to + 1) >> 1;
      if (lines[middle].start <= place) from = middle;
      else to = middle - 1;
    }
    return from;
  }

  function render() {
    if (!lines.length) return;
    const first = Math.max(0, lineAt(list.scrollTop) - 1);
    const last = Math.min(lines.length - 1, lineAt(list.scrollTop + list.clientHeight) + 1);
    const wanted = new Set([lineOf(current)]);
    for (let k = first; k <= last; k += 1) wanted.add(k);
    for (const [k, made] of mounted) {
      // What has the focus stays, or the keyboard would lose it.
      if (wanted.has(k)) continue;
      // What nobody waits for any more is not loaded.
      for (const img of made.querySelectorAll("img")) if (!img.complete) img.removeAttribute("src");
      made.remove();
      mounted.delete(k);
    }
    for (const k of [...wanted].sort((a, b) => a - b)) {
      if (mounted.has(k)) continue;
      const line = lines[k];
      const made = element("div", { class: line.head ? "line head" : "line", role: "presentation" });
      made.style.transform = `translateY(${offsets[k]}px)`;
      if (line.head) made.append(heading(line));
      else for (let place = line.start; place < line.start + line.count; place += 1) made.append(card(place));
      mounted.set(k, made);
      // Readers of screens go through the cards in the document's order.
      let after = null;
      for (const other of space.children) {
        if (Number(other.dataset.line) > k) {
          after = other;
          break;
        }
      }
      made.dataset.line = k;
      space.insertBefore(made, after);
    }
  }

  function onScroll() {
    rushing = Math.abs(list.scrollTop - lastTop) > list.clientHeight / 2;
    lastTop = list.scrollTop;
    render();
    if (rushing) {
      clearTimeout(settled);
      settled = setTimeout(fillPictures, 150);
    }
    rushing = false;
  }

  function fillPictures() {
    for (const views of space.querySelectorAll(".pair[data-row]")) {
      addPictures(views, Number(views.dataset.row));
      delete views.dataset.row;
    }
  }

  const cardAt = (place) => space.querySelector(`[data-place="${place}"]`);

  function reveal(place) {
    const k = lineOf(place);
    const top = offsets[k > 0 && lines[k - 1].head ? k - 1 : k];
    const bottom = offsets[k + 1] + GAP;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (bottom > list.scrollTop + list.clientHeight) list.scrollTop = bottom - list.clientHeight;
    render();
  }

  function select(place, move = true) {
    if (!order.length) return;
    const before = cardAt(current);
    current = Math.max(0, Math.min(order.length - 1, place));
    if (before) before.tabIndex = -1;
    if (move) reveal(current);
    const made = cardAt(current);
    if (!made) return;
    made.tabIndex = 0;
    if (!$("details").open && move) made.focus({ preventScroll: true });
    if ($("details").open) showDetails();
  }

  function decide(row, what) {
    state.who = $("who").value.trim();
    state.decide(row, what);
    changed(row);
    $("live").textContent = `${DONE[what] || "undecided"}: ${shortened(className(row), 80)}`;
  }

  function changed(row) {
    sinceFilter += 1;
    const place = order.indexOf(row);
    const made = place < 0 ? null : cardAt(place);
    if (made) mark(made, row);
    for (const [k, shownLine] of mounted) {
      const line = lines[k];
      if (line.head && place >= line.start && place < line.start + line.count) shownLine.replaceChildren(heading(line));
    }
    if ($("details").open) mark($("details"), order[current]);
    showCounts();
    showAgreement();
  }

  function undo() {
    const row = state.undo();
    if (row < 0) return;
    changed(row);
    const place = order.indexOf(row);
    if (place >= 0) select(place);
    $("live").textContent = `undone: ${shortened(className(row), 80)} is ${DONE[state.get(row)] || "undecided"}`;
  }

  function showCounts() {
    const counts = state.counts();
    const done = counts.accept + counts.reject + counts.skip;
    const saved = served ? (store.unsaved ? " · saving" : " · saved") : "";
    $("bar").max = Math.max(1, total);
    $("bar").value = done;
    $("counts").textContent = `${number(done)} of ${number(total)} decided: ${number(counts.accept)} accepted, ${number(counts.reject)} rejected, ${number(counts.skip)} skipped${saved}`;
    $("undo").disabled = !state.history.length;
    $("problem").hidden = store.problem === "";
    $("problem").textContent = store.problem;
    $("shown").textContent = order.length === total ? "all shown" : `${number(order.length)} of ${number(total)} shown`;
    // Cards stay where they are while somebody decides; this puts the list in order again.
    $("again").hidden = $("decision").value === "" || sinceFilter === 0;
    $("again").textContent = `Apply to ${number(sinceFilter)} decided since`;
  }

  // Against the labels that training did not see: the list, when it changes, and the decisions, at every one.
  let precision = "";
  function showPrecision() {
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
    $("truth-line").textContent = precision && `model ${precision}${yours}`;
  }

  function openDetails(place) {
    if (!order.length) return;
    select(place, false);
    showDialog("details");
    showDetails();
  }

  function showDetails() {
    const dialog = $("details");
    const row = order[current];
    const found = image(row);
    for (const made of dialog.querySelectorAll("img")) {
      if (found.src) made.src = found.src;
      else made.removeAttribute("src");
      made.parentElement.style.aspectRatio = String(found.width / found.height);
      made.classList.toggle("small", found.width < 160);
    }
    drawMap(dialog.querySelector("canvas"), row);
    const facts = [
      ["suggestion", `${adds(row) ? "add" : "remove"} ${className(row)}`],
      ["probability", probability(row).toFixed(4)],
      ["label now", Review.KNOWN[known(row)]],
      ["image", shown(found.path)],
      ["run", shown(data.runs[data.rows.run[row]])],
      ["number", `${number(current + 1)} of ${number(order.length)}`],
    ];
    if (data.truth !== null && $("reveal").checked) facts.push(["hidden label", `suggestion ${TRUTH[truth(row)]}`]);
    dialog.querySelector("dl").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, element("bdi", {}, value))]));
    dialog.querySelector(".buttons").replaceChildren(...decisionButtons(row));
    mark(dialog, row);
    dialog.setAttribute("aria-label", `suggestion ${current + 1} of ${order.length}`);
  }

  // A link with the table in it, which browsers save.
  function exportTable() {
    const blob = new Blob(Review.bytes(Review.csvText(data, state.entries)), { type: "text/csv" });
    const link = element("a", { download: "decisions.csv", href: URL.createObjectURL(blob) });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    state.exported = true;
    $("live").textContent = `decisions.csv: ${number(state.entries.size)} rows`;
  }

  async function loadTable(file) {
    try {
      const { entries, other } = Review.fromCsv(await file.text(), data);
      for (const [row, entry] of entries) state.take(row, entry);
      filter(true);
      $("live").textContent = `${number(entries.size)} decisions loaded`;
      $("problem").hidden = other === 0 && store.problem === "";
      if (other) $("problem").textContent = `${number(other)} rows of ${shown(file.name)} are not on this page, and are left out.`;
    } catch (error) {
      $("problem").hidden = false;
      $("problem").textContent = `${shown(file.name)} is no table of decisions: ${error.message}.`;
    }
  }

  function toggleMap() {
    const choice = $("map");
    if (choice.value !== "off") choice.dataset.last = choice.value;
    choice.value = choice.value === "off" ? choice.dataset.last || "for" : "off";
    redraw();
  }

  function redraw() {
    for (const made of space.querySelectorAll("article")) {
      const canvas = made.querySelector("canvas");
      if (canvas) drawMap(canvas, order[Number(made.dataset.place)]);
    }
    if ($("details").open) drawMap($("details").querySelector("canvas"), order[current]);
  }

  function onKey(event) {
    if (event.altKey || $("keys").open) return;
    const control = event.ctrlKey || event.metaKey;
    const target = event.target;
    if (target.matches("input:not([type=checkbox]), select, textarea")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (control && key !== "z") return;
    const what = { a: "accept", r: "reject", s: "skip" }[key];
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, j: 1, k: -1, Home: -order.length, End: order.length }[key];
    const others = { u: undo, e: exportTable, m: toggleMap, "?": () => showDialog("keys"), f: showFilters };
    if (control) undo();
    else if (what) {
      if (!order.length) return;
      decide(order[current], what);
      select(current + 1);
    } else if (step !== undefined) {
      const rows = Math.abs(step) === columns && columns > 1;
      select($("details").open && rows ? current + Math.sign(step) : stepped(step));
    } else if (others[key]) others[key]();
    else if (key === "Enter" && !$("details").open && !target.matches("button, summary, a")) openDetails(current);
    else return;
    event.preventDefault();
  }

  // Up and down keep the column where the lines of a class end early.
  function stepped(step) {
    if (columns === 1 || Math.abs(step) !== columns) return current + step;
    const k = lineOf(current);
    const column = current - lines[k].start;
    for (let other = k + Math.sign(step); other >= 0 && other < lines.length; other += Math.sign(step)) {
      if (!lines[other].head) return lines[other].start + Math.min(column, lines[other].count - 1);
    }
    return current;
  }

  // One panel at a time, so that the list keeps its room.
  function showPanel(name, open) {
    for (const tab of document.querySelectorAll("[data-panel]")) {
      const chosen = open && tab.dataset.panel === name;
      tab.setAttribute("aria-expanded", String(chosen));
      $(tab.dataset.panel).hidden = !chosen;
    }
  }

  function showFilters() {
    showPanel("filters", true);
    $("class").focus();
  }

  function showDialog(id) {
    $(id).showModal();
    // Not its first button, which Enter would press.
    $(id).focus();
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

  function listen() {
    for (const id of ["class", "kind", "decision", "order", "low", "high"]) $(id).addEventListener("change", filter);
    $("again").addEventListener("click", () => filter(true));
    $("map").addEventListener("change", redraw);
    $("reveal").addEventListener("change", () => {
      for (const made of space.querySelectorAll("article")) mark(made, order[Number(made.dataset.place)]);
    });
    for (const tab of document.querySelectorAll("[data-panel]")) {
      tab.addEventListener("click", () => showPanel(tab.dataset.panel, $(tab.dataset.panel).hidden));
    }
    $("undo").addEventListener("click", undo);
    $("export").addEventListener("click", exportTable);
    $("help").addEventListener("click", () => showDialog("keys"));
    $("load").addEventListener("click", () => $("file").click());
    $("file").addEventListener("change", (event) => {
      if (event.target.files.length) loadTable(event.target.files[0]);
      event.target.value = "";
    });
    $("who").addEventListener("change", () => store.name($("who").value.trim()));
    for (const dialog of document.querySelectorAll("dialog")) {
      dialog.querySelector(".close").addEventListener("click", () => dialog.close());
      dialog.addEventListener("click", (event) => {
        if (event.target === dialog) dialog.close();
      });
    }
    $("details").querySelector(".prior").addEventListener("click", () => select(current - 1));
    $("details").querySelector(".next").addEventListener("click", () => select(current + 1));
    $("details").addEventListener("close", () => select(current));
    document.addEventListener("keydown", onKey);
    let asked = false;
    list.addEventListener("scroll", () => {
      if (asked) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
        onScroll();
      });
    }, { passive: true });
    new ResizeObserver(() => {
      if (list.clientWidth === width) render();
      else {
        layout();
        if (order.length) reveal(current);
      }
    }).observe(list);
    addEventListener("pagehide", () => served && store.send());
    addEventListener("beforeunload", (event) => {
      const lost = served ? store.unsaved > 0 : store.problem !== "" && state.entries.size > 0 && !state.exported;
      if (lost) event.preventDefault();
    });
    addEventListener("storage", (event) => {
      if (served || !event.key || !event.key.startsWith(store.prefix)) return;
      state.entries = store.load(total);
      for (const made of space.querySelectorAll("article")) mark(made, order[Number(made.dataset.place)]);
      showCounts();
    });
  }

  async function start() {
    fillClasses();
    // Not every head has maps.
    $("map-choice").hidden = data.grid === null;
    $("details").querySelector("canvas").parentElement.hidden = data.grid === null;
    if (!data.signed) $("map").querySelector('[value="both"]').remove();
    document.querySelector('[data-panel="truth"]').hidden = data.truth === null;
    showPanel("filters", wide.matches);
    $("who").value = store.name();
    $("where").textContent = served
      ? "Every decision is written to decisions.csv at once."
      : "Decisions stay in this browser until you export them; the file may be closed and opened again.";
    try {
      state.entries = await store.load(total);
    } catch (error) {
      store.problem = `The decisions that are there could not be read: ${error.message}. Load this page again.`;
    }
    listen();
    filter();
    select(0);
  }

  start();
})();
