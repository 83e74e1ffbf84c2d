// Small words for making elements. Text is always set as text, never as markup.

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

// Puts words into an element, or hides it where there are none.
export function tell(element, words) {
  element.textContent = words ?? "";
  element.hidden = !words;
}
