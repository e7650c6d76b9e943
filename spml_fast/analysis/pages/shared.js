"use strict";
// What every page shares. All text goes into a page as text.
const Shared = {
  // Characters that would turn the text about or that nobody sees are spelled out.
  shown: (text) =>
    text.replace(/[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g,
      (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0")),
  shortened: (text, most) =>
    text.length <= most ? text : text.slice(0, Math.ceil(most / 2) - 1) + "…" + text.slice(text.length - Math.floor(most / 2)),
  number: (value) => value.toLocaleString("en"),

  element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "class") made.className = value;
      else made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  },

  // A map's cells, int8 in base64, as colours; the browser stretches them over the picture.
  COLOURS: [[199, 13, 33], [13, 71, 191]],
  drawCells(canvas, text, [height, width], positiveOnly) {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    const raw = atob(text);
    for (let k = 0; k < width * height; k += 1) {
      const cell = (raw.charCodeAt(k) << 24) >> 24;
      const value = positiveOnly ? Math.max(0, cell) : cell;
      // Lifted, so that weak evidence is visible too.
      const alpha = 0.72 * Math.abs(value / 127) ** 0.7;
      pixels.data.set([...Shared.COLOURS[value < 0 ? 1 : 0], Math.round(255 * alpha)], 4 * k);
    }
    context.putImageData(pixels, 0, 0);
  },
};
