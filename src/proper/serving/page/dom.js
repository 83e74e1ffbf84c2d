// Helpers that create elements. Text is always set as text, never as markup.

export const $ = (id) => document.getElementById(id);

// Makes an element: `make("li", {class: "x", "aria-selected": true}, "text", other)`.
export function make(tag, attributes = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...inside);
  return element;
}

// Sets the text of an element, or hides the element if the text is empty.
export function tell(element, words) {
  element.textContent = words ?? "";
  element.hidden = !words;
}
