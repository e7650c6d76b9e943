"use strict";
// The decisions of a review: what they are, where they are kept, how they are undone, and the table of them. Nothing
// here touches the page; view.js shows it.

const Review = (() => {
  const DECISIONS = ["accept", "reject", "skip"];
  const KNOWN = ["unknown", "positive", "negative"];
  const HEADER = ["path", "class", "known", "probability", "suggestion", "split", "run", "decision", "who", "when"];
  const CHUNK = 256;

  // What the model would have the label be: an observed positive is doubted, everything else is suggested.
  const suggestionOf = (known) => (known === 1 ? "negative" : "positive");

  // How sure the model is of what it suggests, 0 to 1.
  const sureness = (known, probability) => (known === 1 ? 1 - probability : probability);

  // A text of one line, of 200 characters at most.
  const oneLine = (text) => [...text.replace(/[\u0000-\u001f\ud800-\udfff]/gu, " ")].slice(0, 200).join("");

  // An entry is [decision, when, who]; none is null.
  class State {
    constructor(size, store, now = () => new Date()) {
      this.size = size;
      this.store = store;
      this.now = now;
      this.who = "";
      this.entries = new Map();
      this.history = [];
      this.exported = true;
    }

    get(row) {
      const entry = this.entries.get(row);
      return entry ? entry[0] : "";
    }

    // Take a decision back with "" as `what`.
    decide(row, what) {
      if (what !== "" && !DECISIONS.includes(what)) throw new Error(`no decision: ${what}`);
      if (this.get(row) === what) return;
      const when = this.now().toISOString().slice(0, 19) + "Z";
      this.take(row, what === "" ? null : [what, when, this.who]);
    }

    // An entry as it is, which can be undone.
    take(row, entry) {
      this.history.push([row, this.entries.get(row) || null]);
      this.set(row, entry);
    }

    set(row, entry) {
      // As `spml-fast review` takes them: one entry that it refuses would hold up all others.
      const kept = entry && entry.map(oneLine);
      if (kept) this.entries.set(row, kept);
      else this.entries.delete(row);
      this.exported = false;
      this.store.save(row, kept);
    }

    // The row whose last decision was taken back; -1 if there is none left.
    undo() {
      if (!this.history.length) return -1;
      const [row, before] = this.history.pop();
      this.set(row, before);
      return row;
    }

    counts() {
      const counts = { accept: 0, reject: 0, skip: 0 };
      for (const [decision] of this.entries.values()) counts[decision] += 1;
      return counts;
    }
  }

  // In the browser, so that the page may be closed. Rows lie together in chunks, so that neither a decision nor a start
  // costs much.
  class LocalStore {
    constructor(prefix, storage) {
      this.prefix = prefix;
      this.storage = storage;
      this.problem = "";
      try {
        storage.setItem(prefix + "test", "1");
        storage.removeItem(prefix + "test");
      } catch (error) {
        this.fail(error);
      }
    }

    fail(error) {
      this.problem = `This browser does not keep your decisions (${error.name || error}); export them before you close the page.`;
    }

    read(chunk) {
      try {
        const found = JSON.parse(this.storage.getItem(this.prefix + chunk) || "{}");
        return found !== null && typeof found === "object" ? found : {};
      } catch (error) {
        this.fail(error);
        return {};
      }
    }

    load(size) {
      const entries = new Map();
      for (let chunk = 0; this.storage && chunk * CHUNK < size; chunk += 1) {
        for (const [row, entry] of Object.entries(this.read(chunk))) {
          if (Array.isArray(entry) && DECISIONS.includes(entry[0])) entries.set(Number(row), entry);
        }
      }
      return entries;
    }

    save(row, entry) {
      const chunk = Math.floor(row / CHUNK);
      // Read again, since the page may be open twice.
      const found = this.read(chunk);
      if (entry) found[row] = entry;
      else delete found[row];
      try {
        this.storage.setItem(this.prefix + chunk, JSON.stringify(found));
        this.problem = "";
      } catch (error) {
        this.fail(error);
      }
    }

    name(value) {
      try {
        if (value !== undefined) this.storage.setItem("spml_fast review name", value);
        return this.storage.getItem("spml_fast review name") || "";
      } catch (error) {
        this.fail(error);
        return value || "";
      }
    }
  }

  // In decisions.csv, by `spml-fast review`: one request at a time, with all that was decided meanwhile.
  class ServerStore {
    constructor(url, changed) {
      this.url = url;
      this.changed = changed;
      this.pending = new Map();
      this.sending = null;
      this.timer = 0;
      this.problem = "";
    }

    async load() {
      const answer = await fetch(this.url);
      if (!answer.ok) throw new Error(`the server says ${answer.status}`);
      return new Map(Object.entries((await answer.json()).entries).map(([row, entry]) => [Number(row), entry]));
    }

    save(row, entry) {
      this.pending.set(row, entry);
      this.plan(150);
    }

    plan(delay) {
      if (this.timer || this.sending) return;
      this.timer = setTimeout(() => this.send(), delay);
    }

    async send() {
      clearTimeout(this.timer);
      this.timer = 0;
      if (this.sending || !this.pending.size) return;
      this.sending = this.pending;
      this.pending = new Map();
      this.changed();
      let problem = "";
      try {
        const body = JSON.stringify({ changes: Object.fromEntries(this.sending) });
        const headers = { "Content-Type": "application/json" };
        // A request that outlives the page may have 64 KiB.
        const answer = await fetch(this.url, { method: "POST", headers, body, keepalive: body.length < 60000 });
        if (!answer.ok) problem = (await answer.json()).error || `the server says ${answer.status}`;
      } catch (error) {
        problem = "spml-fast review does not answer";
      }
      if (problem) {
        // What was decided since counts more.
        this.pending = new Map([...this.sending, ...this.pending]);
        this.problem = `Not saved: ${problem}. Export your decisions before you close the page.`;
      } else {
        this.problem = "";
      }
      this.sending = null;
      if (this.pending.size) this.plan(problem ? 3000 : 150);
      this.changed();
    }

    get unsaved() {
      return this.pending.size + (this.sending ? this.sending.size : 0);
    }

    name() {
      return "";
    }
  }

  // As spml_fast.core.text.formula_safe: no cell is a formula for a spreadsheet.
  const formulaSafe = (text) => (/^[=+\-@\t\r]/.test(text) ? "'" + text : text);

  // A row as Python's csv module writes it.
  function csvLine(cells) {
    const texts = cells.map(formulaSafe);
    const all = texts.some((text) => text.includes("\r"));
    return texts.map((t) => (all || /[",\n]/.test(t) ? `"${t.replaceAll('"', '""')}"` : t)).join(",") + "\n";
  }

  function cells(data, row) {
    const known = data.rows.known[row];
    return [
      data.images[data.rows.image[row]].path,
      data.classes[data.rows.class[row]],
      KNOWN[known],
      data.rows.probability[row],
      suggestionOf(known),
      data.split,
      data.runs[data.rows.run[row]],
    ];
  }

  // The decided rows in the page's order, as `spml-fast relabel` reads them.
  function csvText(data, entries) {
    const lines = [csvLine(HEADER)];
    for (const row of [...entries.keys()].sort((a, b) => a - b)) {
      const [decision, when, who] = entries.get(row);
      lines.push(csvLine([...cells(data, row), decision, who, when]));
    }
    return lines.join("");
  }

  // UTF-8; a file name that is none has its bytes as lone surrogates U+DC80 to U+DCFF, and gets them back.
  function bytes(text) {
    const encoder = new TextEncoder();
    const parts = text.split(/((?<![\ud800-\udbff])[\udc80-\udcff]+)/);
    return parts.map((part, k) => (k % 2 ? Uint8Array.from(part, (c) => c.charCodeAt(0) - 0xdc00) : encoder.encode(part)));
  }

  function parseCsv(text) {
    const rows = [];
    let row = [];
    const pattern = /(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r\n|\n|\r|$)/gy;
    pattern.lastIndex = text.startsWith("\ufeff") ? 1 : 0;
    while (pattern.lastIndex < text.length) {
      const found = pattern.exec(text);
      if (!found) throw new Error(`row ${rows.length + 1} is not CSV`);
      row.push(found[1] === undefined ? found[2] : found[1].replaceAll('""', '"'));
      if (found[3] !== ",") {
        rows.push(row);
        row = [];
      }
    }
    if (row.length) rows.push([...row, ""]);
    return rows;
  }

  // Entries of this page's rows from a table of decisions, and how many rows are of other pages.
  function fromCsv(text, data) {
    const [header, ...rows] = parseCsv(text);
    const column = Object.fromEntries((header || []).map((name, k) => [name.trim(), k]));
    const lacking = ["path", "class", "suggestion", "split", "known", "decision"].filter((name) => !(name in column));
    if (lacking.length) throw new Error(`it has no column ${lacking.join(", ")}`);
    // A browser reads bytes that are not UTF-8 as marks that stand for any of them.
    const key = (...parts) => parts.join("\n").replace(/((?<![\ud800-\udbff])[\udc80-\udcff]|\ufffd)+/g, "\ufffd");
    const place = new Map();
    for (let row = 0; row < data.rows.image.length; row += 1) {
      const [path, name, known, , suggestion, split] = cells(data, row);
      const found = key(path, formulaSafe(name), known, suggestion, split);
      place.set(found, place.has(found) ? undefined : row);
    }
    const entries = new Map();
    let other = 0;
    for (const values of rows) {
      const cell = (name) => values[column[name]] || "";
      const row = place.get(key(cell("path"), cell("class"), cell("known"), cell("suggestion"), cell("split")));
      const decision = cell("decision").trim().toLowerCase();
      if (row === undefined) other += 1;
      else if (DECISIONS.includes(decision)) entries.set(row, [decision, cell("when"), cell("who")]);
    }
    return { entries, other };
  }

  return { State, LocalStore, ServerStore, KNOWN, suggestionOf, sureness, csvText, bytes, parseCsv, fromCsv };
})();
