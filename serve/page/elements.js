// Making elements. What comes from the server only ever becomes text: children that are strings are text nodes.

export const byId = (id) => document.getElementById(id);

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const fault = (message) => element("p", { class: "fault", role: "alert" }, message);

export const empty = (message) => element("p", { class: "empty" }, message);
