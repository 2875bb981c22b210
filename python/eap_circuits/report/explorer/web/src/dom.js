// Elements from text that is never markup.

export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("aria-")) element.setAttribute(key, value);
    else if (value !== false && value !== null) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

export const whole = (x) => Math.round(x).toLocaleString("en");
export const signed = (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + plain(Math.abs(x));
export const plain = (x) =>
  !Number.isFinite(x)
    ? "–"
    : x === 0
      ? "0"
      : x < 1e-3 || x >= 1e5
        ? x.toExponential(2).replace("-", "−")
        : `${+x.toPrecision(4)}`;

/** Is this page a text inside another, as a notebook's output is? Then it has no address. */
export const framed = location.protocol === "about:";

const colours = new Map();
/** A colour of the page's scheme, light or dark. */
export function colour(name) {
  if (!colours.has(name))
    colours.set(name, getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim());
  return colours.get(name);
}

/** Call `redraw` when the scheme changes. */
export function onScheme(redraw) {
  for (const query of ["(prefers-color-scheme: dark)", "print"]) {
    matchMedia(query).addEventListener("change", () => {
      colours.clear();
      redraw();
    });
  }
}

/** Is a key the browser's own: print, zoom the page, go back? */
export const ofBrowser = (event) => event.ctrlKey || event.metaKey || event.altKey;
