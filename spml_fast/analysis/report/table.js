"use strict";
// The table of classes: what its cells say, in which order rows stand, and the rows that are in view.

// Figures of the classes from the page's data; null where a figure is not defined.
const makeFigures = (data) => {
  const ratio = (part, whole) => (whole > 0 ? (100 * part) / whole : null);
  const of = (group, name, row) => (group[name] ? group[name][row] : null);
  const positives = (group, row) => of(group, "positives", row);
  const figures = {
    ap: (group, row) => of(group, "ap", row),
    deviation: (group, row) => of(group, "deviation", row),
    positives,
    prevalence: (group, row) => (positives(group, row) === null ? null : ratio(positives(group, row), positives(group, row) + group.negatives[row])),
    precision: (group, row) => (group.predicted ? ratio(group.hits[row], group.predicted[row]) : of(group, "precision", row)),
    recall: (group, row) => (group.predicted ? ratio(group.hits[row], group.positives[row]) : of(group, "recall", row)),
    // Infinite where a class is never predicted.
    threshold: (group, row) => (group.thresholds ? (group.thresholds[row] === null ? Infinity : group.thresholds[row]) : null),
  };
  const there = (group, name) => data.names.some((_, row) => figures[name](group, row) !== null);
  return { ...figures, there };
};

// A threshold: a probability, which may be small, or infinite where a class is never predicted.
const thresholdText = (value) => (value === null ? "–" : value === Infinity ? "never" : value < 0.01 ? value.toPrecision(2) : value.toFixed(3));

const makeTable = (data, figures, act) => {
  const { element, shown, shortened, number } = Shared;
  const $ = (id) => document.getElementById(id);
  const narrow = matchMedia("(max-width: 40rem)");
  // Where there is no room for every column.
  const medium = matchMedia("(max-width: 60rem)");
  const text = (value, digits) => (value === null ? "–" : value.toFixed(digits));
  const names = data.names.map(shown);
  const folded = names.map((name) => name.toLowerCase());
  let columns = [];
  let order = [];
  let sort = { key: "ap", down: true };
  let current = 0;
  const rows = new Map();

  // Columns of two settings, the second of which may be none.
  function columnsOf(first, second) {
    const made = [{ key: "name", label: "class", value: (row) => folded[row], show: (row) => names[row], track: "", down: false }];
    const add = (key, label, short, track, value, show, extra = false) => made.push({ key, label, short, track, value, show, extra, down: true });
    const per = (name, digits) => [(row) => figures[name](first, row), (row) => text(figures[name](first, row), digits)];
    if (figures.there(first, "ap")) add("ap", second ? `AP, ${shortened(first.label, 14)}` : "AP, %", "AP", "4.6rem", ...per("ap", 1));
    if (second) {
      const other = (row) => figures.ap(second, row);
      const gain = (row) => (figures.ap(first, row) === null || other(row) === null ? null : other(row) - figures.ap(first, row));
      add("against", `AP, ${shortened(second.label, 14)}`, "other", "4.6rem", other, (row) => text(other(row), 1));
      add("gain", "difference", "±", "4.8rem", gain, (row) => (gain(row) > 0 ? "+" : "") + text(gain(row), 1));
    }
    if (figures.there(first, "precision")) add("precision", "precision, %", "P", "5.4rem", ...per("precision", 1));
    if (figures.there(first, "recall")) add("recall", "recall, %", "R", "4.6rem", ...per("recall", 1));
    if (!second && figures.there(first, "threshold")) add("threshold", "threshold", "from", "4.5rem", per("threshold")[0], (row) => thresholdText(figures.threshold(first, row)), true);
    if (figures.there(first, "positives")) {
      add("positives", "positives known", "+", "4.6rem", (row) => figures.positives(first, row), (row) => number(first.positives[row]), Boolean(second));
      if (!second) add("prevalence", "prevalence", "", "5rem", (row) => figures.prevalence(first, row), (row) => text(figures.prevalence(first, row), 1) + (figures.prevalence(first, row) === null ? "" : "%"), true);
    }
    if (data.training && !second) add("training", "seen in training", "", "4.4rem", (row) => data.training[row], (row) => number(data.training[row]), true);
    return made.filter((column) => !(medium.matches && column.extra));
  }

  let settings = [];
  const curve = () => Boolean(settings[0].curves) && !medium.matches;

  function setSettings(first, second) {
    settings = [first, second];
    columns = columnsOf(first, second);
    if (!columns.some((column) => column.key === sort.key)) sort = { key: columns[Math.min(1, columns.length - 1)].key, down: true };
    $("grid").style.setProperty("--tracks", columns.slice(1).map((c) => c.track).join(" ") + (curve() ? " 4.4rem" : ""));
    $("sort").replaceChildren(...columns.flatMap((column) => [true, false].map((down) =>
      element("option", { value: `${column.key} ${down}` }, `${column.label.replace(", %", "")}, ${column.key === "name" ? (down ? "Z to A" : "A to Z") : down ? "highest first" : "lowest first"}`))));
    drawHeads();
    arrange();
  }

  function drawHeads() {
    const made = columns.map((column) => {
      const button = element("button", { type: "button" }, column.label);
      button.addEventListener("click", () => sortBy(column.key, sort.key === column.key ? !sort.down : column.down));
      return element("div", { role: "columnheader", "data-key": column.key }, button);
    });
    if (curve()) made.push(element("div", { role: "columnheader" }, element("span", {}, "curve")));
    $("heads").replaceChildren(...made);
    $("grid").setAttribute("aria-colcount", made.length);
  }

  function sortBy(key, down) {
    sort = { key, down };
    arrange();
  }

  // Undefined figures stand last, whichever way.
  function arrange() {
    const column = columns.find((one) => one.key === sort.key);
    const values = names.map((_, row) => column.value(row));
    const wanted = $("find").value.trim().toLowerCase();
    const sign = sort.down ? -1 : 1;
    const chosen = names.map((_, row) => row).filter((row) => folded[row].includes(wanted));
    chosen.sort((a, b) => {
      if (values[a] === values[b]) return a - b;
      if (values[a] === null) return 1;
      if (values[b] === null) return -1;
      return values[a] < values[b] ? -sign : sign;
    });
    order = chosen;
    current = 0;
    $("sort").value = `${sort.key} ${sort.down}`;
    for (const head of $("heads").children) {
      if (head.dataset.key) head.setAttribute("aria-sort", head.dataset.key !== sort.key ? "none" : sort.down ? "descending" : "ascending");
    }
    $("found").textContent = order.length === names.length ? `${number(names.length)} classes` : `${number(order.length)} of ${number(names.length)} classes`;
    $("body").scrollTop = 0;
    draw(true);
    if (order.length) act.show(order[0]);
    else $("curve").replaceChildren();
  }

  const height = () => (narrow.matches ? 58 : 36);

  function makeRow(place) {
    const row = order[place];
    const cells = columns.map((column) => {
      const cell = element("div", { role: "cell", ...(column.short ? { "data-short": column.short } : {}) });
      if (column.key === "name") {
        cell.append(element("bdi", { title: shortened(names[row], 400) }, shortened(names[row], 120)));
      } else {
        cell.append(column.show(row));
      }
      return cell;
    });
    if (curve()) cells.push(element("div", { role: "cell" }, act.spark(row)));
    const made = element("div", { role: "row", class: "row", tabindex: "-1", "data-place": place, "aria-rowindex": place + 1 }, ...cells);
    made.style.top = `${place * height()}px`;
    return made;
  }

  // Only rows in view, and some around, are in the page.
  function draw(anew, all = false) {
    const size = height();
    const body = $("body");
    $("grid").style.setProperty("--row", `${size}px`);
    $("space").style.height = `${Math.max(order.length, 1) * size}px`;
    body.style.height = `${Math.min(order.length, 14) * size + 1}px`;
    if (anew) {
      rows.clear();
      $("space").replaceChildren();
      $("grid").setAttribute("aria-rowcount", order.length);
    }
    const first = all ? 0 : Math.max(0, Math.floor(body.scrollTop / size) - 6);
    const last = all ? Math.min(order.length, 500) : Math.min(order.length, Math.ceil((body.scrollTop + body.clientHeight) / size) + 6);
    for (const [place, made] of rows) {
      if ((place < first || place >= last) && made !== document.activeElement) {
        made.remove();
        rows.delete(place);
      }
    }
    for (let place = first; place < last; place += 1) {
      if (!rows.has(place)) {
        const made = makeRow(place);
        rows.set(place, made);
        // Readers and printers take rows in their order in the page.
        const after = rows.get(place + 1);
        $("space").insertBefore(made, after && after.parentNode ? after : null);
      }
    }
    mark();
  }

  function mark() {
    for (const [place, made] of rows) {
      made.tabIndex = place === current ? 0 : -1;
      made.classList.toggle("current", place === current);
    }
  }

  function select(place) {
    if (place < 0 || place >= order.length) return;
    current = place;
    mark();
    act.show(order[place]);
  }

  function go(place) {
    const to = Math.max(0, Math.min(order.length - 1, place));
    const size = height();
    const body = $("body");
    if (to * size < body.scrollTop) body.scrollTop = to * size;
    if ((to + 1) * size > body.scrollTop + body.clientHeight) body.scrollTop = (to + 1) * size - body.clientHeight;
    draw(false);
    rows.get(to)?.focus({ preventScroll: true });
    select(to);
  }

  const placeOf = (event) => Number(event.target.closest?.(".row")?.dataset.place ?? -1);
  $("body").addEventListener("scroll", () => requestAnimationFrame(() => draw(false)), { passive: true });
  $("body").addEventListener("pointerover", (event) => select(placeOf(event)));
  $("body").addEventListener("focusin", (event) => select(placeOf(event)));
  $("body").addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor($("body").clientHeight / height()) - 1);
    const steps = { ArrowDown: current + 1, ArrowUp: current - 1, PageDown: current + page, PageUp: current - page, Home: 0, End: order.length - 1 };
    if (!(event.key in steps) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    go(steps[event.key]);
  });
  $("find").addEventListener("input", arrange);
  $("sort").addEventListener("change", () => {
    const [key, down] = $("sort").value.split(" ");
    sortBy(key, down === "true");
  });
  narrow.addEventListener("change", () => draw(true));
  medium.addEventListener("change", () => setSettings(...settings));
  addEventListener("beforeprint", () => draw(false, true));
  addEventListener("afterprint", () => draw(true));
  return { setSettings, sortBy, names };
};
