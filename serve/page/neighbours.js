// The rows of the corpora nearest to the question.

import { label, painted } from "./colours.js";
import { element, empty } from "./elements.js";

const FIRST = 8;

export function neighbours(rows) {
  if (!rows.length) return [empty("The index has no row near this question.")];
  const list = element("ol", { class: "neighbours" }, ...rows.slice(0, FIRST).map(item));
  if (rows.length <= FIRST) return [list];
  const more = element("button", { type: "button", class: "quiet" }, `Show all ${rows.length}`);
  more.addEventListener("click", () => {
    list.classList.add("whole");
    list.append(...rows.slice(FIRST).map(item));
    list.children[FIRST].tabIndex = -1;
    list.children[FIRST].focus();
    more.remove();
  });
  return [list, more];
}

function item({ task, text, similarity }) {
  const meter = painted(element("span", { class: "meter", "aria-hidden": "true" }), task);
  meter.style.setProperty("--length", `${100 * Math.max(0, similarity)}%`);
  return element(
    "li",
    {},
    element(
      "p",
      { class: "whence" },
      label(task),
      meter,
      element("span", { class: "number" }, element("span", { class: "unseen" }, "similarity "), similarity.toFixed(3)),
    ),
    element("p", { class: "row-text" }, text),
  );
}
