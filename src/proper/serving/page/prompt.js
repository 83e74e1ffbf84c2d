// Prompt fields from the run's template: one field per column.

import { make } from "./dom.js";

// Builds labelled fields for `columns` in `box`; `prefix` keeps element ids unique. Returns their accessors.
export function promptFields(box, template, prefix, rows) {
  const columns = [...new Set(template.columns)];
  const areas = new Map();
  for (const column of columns) {
    const area = make("textarea", { id: `${prefix}-${areas.size}`, rows, dir: "auto", "aria-required": "true" });
    areas.set(column, area);
    box.append(make("div", { class: "field" }, make("label", { for: area.id }, title(column)), area));
  }
  return {
    areas: [...areas.values()],
    empty: () => [...areas.values()].find((area) => !area.value.trim()),
    set: (values) => [...areas.values()].forEach((area, at) => { area.value = values[at]; }),
    values: () => [...areas.values()].map((area) => area.value.trim()),
    // The prompt: literals[0] {columns[0]} literals[1] ...
    text: () => template.columns.reduce(
      (text, column, at) => text + areas.get(column).value.trim() + template.literals[at + 1], template.literals[0]),
  };
}

// Marks one field as missing until it has input, and focuses it.
export function missing(area) {
  area.setAttribute("aria-invalid", "true");
  area.addEventListener("input", () => area.removeAttribute("aria-invalid"), { once: true });
  area.focus();
}

const title = (column) => {
  const words = column.replace(/_/g, " ");
  return words === "input" || words === "prompt" ? "Text" : words.charAt(0).toUpperCase() + words.slice(1);
};
