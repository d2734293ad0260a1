
// A saved picture. The widget's own script stands in front of this one, and its values beside it; no kernel is here.

// What a widget expects of anywidget's model.
function savedModel(values) {
  const listeners = {};
  const change = (more) => {
    Object.assign(values, more);
    for (const name of Object.keys(more)) for (const listener of listeners[`change:${name}`] ?? []) listener();
  };
  return {
    change,
    get: (name) => values[name],
    set: (name, value) => change({ [name]: value }),
    save_changes: () => {},
    on: (event, listener) => (listeners[event] ??= new Set()).add(listener),
    off: (event, listener) => listeners[event]?.delete(listener),
  };
}

const bytesIn = (base64) => Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));

async function unpacked(base64) {
  const stream = new Blob([bytesIn(base64)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text(), (_, value) => (value?.base64 === undefined ? value : bytesIn(value.base64)));
}

// Widgets look for JupyterLab's mark of a dark page. Here the page around the picture decides, or else the browser.
function followTheme() {
  const { dataset } = document.body, browser = matchMedia("(prefers-color-scheme: dark)");
  const follow = () => (dataset.jpThemeLight = !(dataset.theme === "dark" || (dataset.theme !== "light" && browser.matches)));
  follow();
  browser.addEventListener("change", follow);
  new MutationObserver(follow).observe(document.body, { attributeFilter: ["data-theme"] });
}

function makeMenu(states, choose) {
  const menu = document.createElement("select"), label = document.createElement("label");
  for (const name of Object.keys(states)) menu.append(new Option(name));
  menu.addEventListener("change", () => choose(states[menu.value]));
  label.append("Stored: ", menu);
  return label;
}

async function showSaved(root) {
  const { states, shared } = await unpacked(root.querySelector("[type='application/gzip']").textContent);
  const model = savedModel({ ...shared, ...Object.values(states)[0], saved: true });
  if (Object.keys(states).length > 1) root.append(makeMenu(states, model.change));
  followTheme();
  const el = document.createElement("div");
  root.append(el);
  render({ model, el });
}

const savedRoot = document.getElementById("hsa-saved");
showSaved(savedRoot).catch((error) => savedRoot.append(`The picture cannot be shown. ${error}`));
