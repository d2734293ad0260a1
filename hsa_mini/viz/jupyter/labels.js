// Invisible: adds what ipywidgets leaves out, so that a screen reader and the keyboard can use the widgets,
// and pictures are dark where JupyterLab is dark.

// An image on white is turned over: white becomes nearly black, and the colours keep their hue.
const DARK = `body[data-jp-theme-light="false"] :is(.hsa-frame, img.jp-needs-light-background)
  { filter: invert(0.93) hue-rotate(180deg); }`;

function darken() {
  if (document.getElementById("hsa-dark")) return;
  const style = document.createElement("style");
  style.id = "hsa-dark";
  style.textContent = DARK;
  document.head.append(style);
}

function label(box) {
  for (const slider of box.querySelectorAll(".widget-hslider")) {
    const handle = slider.querySelector(".noUi-handle");
    const text = slider.querySelector("label");
    if (!handle || !text) continue;
    handle.setAttribute("aria-label", text.textContent);
    handle.setAttribute("data-lm-suppress-shortcuts", "true"); // or JupyterLab takes the arrow keys
  }
  for (const line of box.querySelectorAll(".widget-label")) {
    if (line.parentElement !== box) continue;
    line.setAttribute("role", "status"); // screen readers read it aloud when it changes
    line.style.whiteSpace = "normal"; // a long line is wrapped instead of being cut
  }
}

function render({ el }) {
  el.style.display = "none";
  darken();
  const observer = new MutationObserver(() => apply());
  let box = null;
  const apply = () => label(box);
  const waiting = setInterval(() => {
    box = el.closest(".widget-vbox"); // null until this view is part of the page
    if (!box) return;
    clearInterval(waiting);
    observer.observe(box, { childList: true, subtree: true }); // sliders are added later than this view
    apply();
  }, 50);
  return () => {
    clearInterval(waiting);
    observer.disconnect();
  };
}

export default { render };
