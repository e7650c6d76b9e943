"use strict";
// What is seen of a suggestion: its card, its larger view, the heading of its class. All text goes into the page as text.

// The page's data, the decisions so far, and what to do when a card is used: decide(row, what), select(place), open(place).
const makeCards = (data, state, act) => {
  const $ = (id) => document.getElementById(id);
  const { shown, shortened, number, element } = Shared;
  const className = (row) => shown(data.classes[data.rows.class[row]]);
  const image = (row) => data.images[data.rows.image[row]];
  const known = (row) => data.rows.known[row];
  const probabilities = Float64Array.from(data.rows.probability, Number);
  const probability = (row) => probabilities[row];
  const sure = (row) => Review.sureness(known(row), probability(row));
  const adds = (row) => Review.suggestionOf(known(row)) === "positive";
  const truth = (row) => (data.truth === null ? "?" : data.truth[row]);

  function drawMap(canvas, row) {
    const text = data.rows.map[row];
    const choice = $("map").value;
    canvas.hidden = text === "" || choice === "off";
    if (!canvas.hidden) Shared.drawCells(canvas, text, data.grid, choice === "for");
  }

  const KEYS = { accept: "A", reject: "R", skip: "S" };
  const WORDS = { accept: "Accept", reject: "Reject", skip: "Skip" };
  const DONE = { accept: "accepted", reject: "rejected", skip: "skipped" };

  // What the buttons of a card do is the caller's.
  function decisionButtons(row) {
    return Object.keys(WORDS).map((what) => {
      const button = element("button", { type: "button", class: what, "data-what": what }, WORDS[what], element("kbd", {}, KEYS[what]));
      button.addEventListener("click", (event) => {
        event.stopPropagation();
        // The button of a decision takes it back.
        act.decide(row, state.get(row) === what ? "" : what);
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

  // A card at a place of the list. Without pictures it waits for `addPictures`.
  function card(row, place, size, withPictures) {
    const found = image(row);
    const name = className(row);
    const verb = adds(row) ? "add" : "remove";
    const views = element("div", { class: "pair" }, element("figure"));
    if (data.grid !== null) views.append(element("figure"));
    if (!found.src) views.replaceChildren(element("p", { class: "muted" }, "the image cannot be read"));
    else if (withPictures) addPictures(views, row);
    else views.dataset.row = row;
    const ratio = found.width / found.height;
    for (const figure of views.querySelectorAll("figure")) figure.style.aspectRatio = String(ratio);
    for (const figure of views.querySelectorAll("figure")) figure.classList.toggle("tall", ratio < 1);
    const made = element(
      "article",
      { tabindex: "-1", "aria-posinset": place + 1, "aria-setsize": size, "data-place": place },
      views,
      element("p", { class: "claim" }, element("span", { class: `verb ${verb}` }, verb), element("bdi", { title: shortened(name, 400) }, shortened(name, 80)),
        element("span", { class: "probability", title: "probability of the class" }, probability(row).toFixed(3))),
      element("p", { class: "path" }, element("bdi", { title: shortened(shown(found.path), 400) }, shortened(shown(found.path), 60)),
        element("span", { class: "truth" })),
      element("div", { class: "buttons" }, ...decisionButtons(row)),
    );
    made.addEventListener("click", () => act.select(place));
    views.addEventListener("click", () => act.open(place));
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

  // What stands over the rows of a class.
  function heading(rows) {
    let done = 0;
    for (const row of rows) done += state.get(row) !== "";
    const name = className(rows[0]);
    return element("h2", {}, element("bdi", { title: shortened(name, 400) }, shortened(name, 80)),
      element("span", { class: "muted" }, `${number(rows.length)} suggested, ${number(done)} decided`));
  }

  // The larger view of a card.
  function fillDetails(dialog, row, place, size) {
    const found = image(row);
    for (const made of dialog.querySelectorAll("img")) {
      if (found.src) made.src = found.src;
      else made.removeAttribute("src");
      made.parentElement.style.setProperty("--ratio", found.width / found.height);
      made.classList.toggle("small", found.width < 160);
    }
    drawMap(dialog.querySelector("canvas"), row);
    const facts = [
      ["suggestion", `${adds(row) ? "add" : "remove"} ${className(row)}`],
      ["probability", probability(row).toFixed(4)],
      ["label now", Review.KNOWN[known(row)]],
      ["image", shown(found.path)],
      ["run", shown(data.runs[data.rows.run[row]])],
      ["number", `${number(place + 1)} of ${number(size)}`],
    ];
    if (data.truth !== null && $("reveal").checked) facts.push(["hidden label", `suggestion ${TRUTH[truth(row)]}`]);
    dialog.querySelector("dl").replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, element("bdi", {}, value))]));
    dialog.querySelector(".buttons").replaceChildren(...decisionButtons(row));
    mark(dialog, row);
    dialog.setAttribute("aria-label", `suggestion ${place + 1} of ${size}`);
  }

  return { shown, shortened, number, className, known, probability, sure, truth, element, drawMap, addPictures, card, mark, heading, fillDetails, DONE };
};
