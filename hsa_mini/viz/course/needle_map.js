// Where a model looked in a long text: the scores of all chunks, and a lens that mouse and arrow keys move.
// Dimensions: L layers, N chunks. The numbers come from Python once for every question.

const RED = "#D55E00", BLUE = "#0072B2", SKY = "#56B4E9", ORANGE = "#E69F00";
const LEFT = 12, TOP = 20, ROW = 74, GAP = 26, LENS_ROW = 84;
const LENS = 24; // chunks on either side of the middle of the lens

function read(model) {
  const data = model.get("data");
  const [L, N] = data.shape;
  const scores = typed(data.scores, Float32Array);
  const layers = data.kept.map((kept, layer) => {
    const row = scores.subarray(layer * N, (layer + 1) * N);
    const seen = row.filter(Number.isFinite);
    const low = seen.reduce((a, b) => Math.min(a, b), Infinity);
    const high = seen.reduce((a, b) => Math.max(a, b), -Infinity);
    return { kept: new Set(kept), row, height: (score) => Math.max((score - low) / (high - low || 1), 0) };
  });
  return { ...data, L, N, layers, needle: new Set(data.needle) };
}

// The best score of the chunks behind every pixel: thousands of chunks do not fit side by side.
function peaks({ row, height }, N, width) {
  const best = new Float32Array(Math.ceil(width));
  for (let i = 0; i < N; i++) {
    const x = Math.floor((i / N) * best.length);
    best[x] = Math.max(best[x], Number.isFinite(row[i]) ? height(row[i]) : 0);
  }
  return best;
}

function triangle(pen, x, y, size, color) {
  pen.fillStyle = color;
  pen.beginPath();
  pen.moveTo(x, y);
  pen.lineTo(x - size, y - 1.6 * size);
  pen.lineTo(x + size, y - 1.6 * size);
  pen.fill();
}

function draw(canvas, width, numbers, middle) {
  const { L, N, layers } = numbers;
  const { pen, look } = cleared(canvas, width, TOP + L * (ROW + GAP + LENS_ROW + GAP));
  look.bar = look.dark ? SKY : BLUE;
  pen.font = "13px sans-serif";
  const box = { x: LEFT, w: width - 2 * LEFT };
  layers.forEach((layer, l) => {
    const y = TOP + l * (ROW + GAP + LENS_ROW + GAP);
    drawAll(pen, look, { ...box, y, h: ROW }, numbers, layer, l, middle);
    drawLens(pen, look, { ...box, y: y + ROW + GAP, h: LENS_ROW }, numbers, layer, middle);
  });
  return box;
}

function drawAll(pen, look, box, { N, tokens, needle }, layer, l, middle) {
  const at = (chunk) => box.x + ((chunk + 0.5) / N) * box.w, bottom = box.y + box.h;
  pen.fillStyle = look.pale;
  const half = Math.max((LENS / N) * box.w, 3);
  pen.fillRect(at(middle) - half, box.y, 2 * half, box.h);
  pen.fillStyle = look.bar;
  peaks(layer, N, box.w).forEach((share, x) => pen.fillRect(box.x + x, bottom - share * box.h, 1, share * box.h));
  for (const chunk of layer.kept) triangle(pen, at(chunk), box.y, 4, RED);
  pen.fillStyle = ORANGE;
  for (const chunk of needle) pen.fillRect(at(chunk) - 1, box.y, 2, box.h);
  pen.strokeStyle = look.ink;
  pen.strokeRect(at(middle) - half, box.y, 2 * half, box.h);
  pen.fillStyle = look.ink;
  pen.fillRect(box.x, bottom, box.w, 1);
  pen.textAlign = "left";
  pen.fillText(`layer ${l}: scores of ${N.toLocaleString("en")} chunks`, box.x, bottom + 15);
  pen.textAlign = "right";
  pen.fillText(`token ${tokens.toLocaleString("en")}`, box.x + box.w, bottom + 15);
}

function drawLens(pen, look, box, { N, needle }, layer, middle) {
  const step = box.w / (2 * LENS + 1), bottom = box.y + box.h - 16;
  for (let i = middle - LENS; i <= middle + LENS; i++) {
    if (i < 0 || i >= N) continue;
    const x = box.x + (i - middle + LENS) * step, share = Number.isFinite(layer.row[i]) ? layer.height(layer.row[i]) : 0;
    const high = Math.max(share * (box.h - 28), 1);
    if (i === middle) {
      pen.fillStyle = look.pale;
      pen.fillRect(x, box.y, step, box.h - 16);
    }
    pen.fillStyle = needle.has(i) ? ORANGE : look.bar;
    pen.fillRect(x + 1, bottom - high, Math.max(step - 2, 1), high);
    if (layer.kept.has(i)) triangle(pen, x + step / 2, bottom - high - 2, 4, RED);
  }
  pen.fillStyle = look.ink;
  pen.fillRect(box.x, bottom, box.w, 1);
  pen.textAlign = "center";
  pen.fillText(`chunk ${middle.toLocaleString("en")}`, box.x + box.w / 2, bottom + 14);
}

function describe({ layers, needle, texts }, chunk) {
  const by = layers.map(({ row, kept }, l) => {
    const score = Number.isFinite(row[chunk]) ? row[chunk].toFixed(2) : "not visible";
    return `layer ${l}: ${score}${kept.has(chunk) ? ", kept" : ""}`;
  });
  return {
    line: `Chunk ${chunk.toLocaleString("en")}${needle.has(chunk) ? " (holds the needle)" : ""}, scores in ${by.join("; ")}.`,
    text: texts[chunk] ?? "",
  };
}

function render({ model, el }) {
  const canvas = sliderCanvas(model, "touch-action: none");
  const line = document.createElement("div"), text = document.createElement("pre");
  line.style.cssText = "padding: 4px 0; font-size: 14px";
  text.style.cssText = "margin: 0; min-height: 7em; white-space: pre-wrap; font-size: 12px";
  el.append(canvas, line, text);

  let numbers, box;
  const load = () => {
    numbers = read(model);
  };
  const redraw = (width) => {
    const chunk = Math.min(model.get("chunk"), numbers.N - 1);
    box = draw(canvas, width, numbers, chunk);
    const words = describe(numbers, chunk);
    line.textContent = words.line;
    text.textContent = words.text;
    canvas.setAttribute("aria-valuemax", numbers.N - 1);
    canvas.setAttribute("aria-valuenow", chunk);
    canvas.setAttribute("aria-valuetext", `${words.line} ${words.text}`);
  };
  const last = () => numbers.N - 1;
  // Page keys go to the next chunk that a layer kept.
  const page = (chunk, way) => {
    const kept = numbers.layers.flatMap((layer) => [...layer.kept]).filter((other) => way * (other - chunk) > 0);
    return kept.length ? way * Math.min(...kept.map((other) => way * other)) : chunk;
  };
  const { move, end } = live({ model, canvas, name: "chunk", last, page, load, redraw });
  canvas.addEventListener("pointermove", (event) => {
    const { left, top } = canvas.getBoundingClientRect();
    const y = (event.clientY - top - TOP) % (ROW + GAP + LENS_ROW + GAP);
    const share = (event.clientX - left - box.x) / box.w;
    if (y < ROW && share >= 0 && share < 1) move(Math.floor(share * numbers.N));
  });
  return end;
}

export default { render };
