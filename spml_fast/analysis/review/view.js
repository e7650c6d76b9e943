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

  const act = { decide, select: (place) => select(place, false), open: openDetails };
  const cards = makeCards(data, state, act);
  const { shown, shortened, number, className, sure, element, drawMap, mark, heading, DONE } = cards;
  const filters = makeFilters(data, state, cards);

  function storage() {
    try {
      return window.localStorage;
    } catch (error) {
      return null;
    }
  }

  const rowsOf = (line) => order.slice(line.start, line.start + line.count);
  const showDetails = () => cards.fillDetails($("details"), order[current], current, order.length);

  function filter(keep) {
    const kept = order[current];
    const sign = $("order").value === "unsure" ? -1 : 1;
    const grouped = $("order").value === "class";
    order = [];
    const passes = filters.passing();
    for (let row = 0; row < total; row += 1) if (passes(row)) order.push(row);
    order.sort((a, b) => (grouped ? data.rows.class[a] - data.rows.class[b] : 0) || sign * (sure(b) - sure(a)) || a - b);
    current = keep === true ? Math.max(0, order.indexOf(kept)) : 0;
    sinceFilter = 0;
    layout();
    list.scrollTop = 0;
    if (current > 0) reveal(current);
    showCounts();
    filters.showPrecision(order);
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
      if (line.head) made.append(heading(rowsOf(line)));
      else for (let place = line.start; place < line.start + line.count; place += 1) made.append(cards.card(order[place], place, order.length, !rushing));
      mounted.set(k, made);
      if (!line.head && current >= line.start && current < line.start + line.count) made.children[current - line.start].tabIndex = 0;
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
      cards.addPictures(views, Number(views.dataset.row));
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
      if (line.head && place >= line.start && place < line.start + line.count) shownLine.replaceChildren(heading(rowsOf(line)));
    }
    if ($("details").open) mark($("details"), order[current]);
    showCounts();
    filters.showAgreement();
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

  function openDetails(place) {
    if (!order.length) return;
    select(place, false);
    showDialog("details");
    showDetails();
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
    if (event.key === "Escape" && target.closest("header")) backToCards();
    if (target.matches("input:not([type=checkbox]), select, textarea")) return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    if (control && key !== "z") return;
    const what = { a: "accept", r: "reject", s: "skip" }[key];
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, j: 1, k: -1, Home: -Infinity, End: Infinity }[key];
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

  // Where keys decide: in a field they are typed.
  function backToCards() {
    list.focus({ preventScroll: true });
  }

  function showDialog(id) {
    $(id).showModal();
    // Not its first button, which Enter would press.
    $(id).focus();
  }

  function listen() {
    for (const id of ["class", "kind", "decision", "order", "low", "high"]) $(id).addEventListener("change", filter);
    $("again").addEventListener("click", () => filter(true));
    $("map").addEventListener("change", redraw);
    for (const field of $("filters").querySelectorAll("select")) {
      // Arrow keys go through what there is to choose; who has chosen with the pointer goes on with the cards.
      let pointed = false;
      field.addEventListener("pointerdown", () => { pointed = true; });
      field.addEventListener("keydown", () => { pointed = false; });
      field.addEventListener("change", () => pointed && backToCards());
    }
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
    filters.fillClasses();
    // Not every head has maps.
    $("map-choice").hidden = data.grid === null;
    $("details").querySelector("canvas").parentElement.hidden = data.grid === null;
    if (!data.signed) $("map").querySelector('[value="both"]').remove();
    document.querySelector('[data-panel="truth"]').hidden = data.truth === null;
    showPanel("filters", wide.matches);
    $("who").value = store.name();
    $("where").textContent = served
      ? "Every decision is written to the table of `spml-fast review` at once."
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
