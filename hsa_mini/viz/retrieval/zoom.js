// The scores of all chunks, one row per layer, at three distances: regions of the text, the chunks of a region, the tokens of
// a chunk. A row has at most CELLS cells at any distance, so a text of a million tokens is drawn as fast as one of a thousand.

const CELLS = 128;
const ROW = 74, LEFT = 76, RIGHT = 12, AXIS = 22; // in pixels
const EMPTY = "no chunk is complete before this token";

// A view: the columns [first, last) in cells of `step` columns, or, if `chunk` is a number, the tokens of this chunk.
const viewOf = (first, last) => ({ first, last, step: Math.max(Math.ceil((last - first) / CELLS), 1), chunk: null });
const cellsOf = ({ S }, { first, last, step, chunk }) => (chunk === null ? Math.ceil((last - first) / step) : S);
const cellOf = ({ width }, { first, last, step }, chunk) => {
  const column = Math.floor(chunk / width);
  return first <= column && column < last ? Math.floor((column - first) / step) : null;
};

// The view of one cell: a region, or a chunk. Where a column stands for several chunks, its kept one is opened.
function inside(picture, view, cell, kept) {
  const first = view.first + cell * view.step, last = Math.min(first + view.step, view.last);
  if (view.chunk !== null) return null;
  if (view.step > 1) return viewOf(first, last);
  const chunk = kept.find(({ chunk }) => Math.floor(chunk / picture.width) === first)?.chunk ?? first * picture.width;
  return { first, last, step: 1, chunk };
}

function nameOf(picture, { first, last, chunk }) {
  if (chunk !== null) return `chunk ${count(chunk)}`;
  const end = Math.min(last * picture.width, picture.chunks);
  return first === 0 && end === picture.chunks ? `${count(picture.text_tokens)} tokens` : `chunks ${count(first * picture.width)} to ${count(end - 1)}`;
}

// What a row draws: { name, values: of each cell, low, high: of the whole row, marks: cells of kept chunks and their values }.
function rowOf(picture, selected, name, view) {
  const { J, C, K, S, width } = picture, { token, layer, head } = selected, at = token * J + groupOf(picture, head);
  if (view.chunk !== null) {
    const kept = keptChunks(picture, selected).find(({ chunk }) => chunk === view.chunk);
    const values = kept?.attention ?? [];
    return { name, values, low: 0, high: Math.max(...values, 0), marks: [], empty: "this layer does not keep the chunk" };
  }
  const scores = picture.layers[layer].scores.subarray(at * C, (at + 1) * C);
  let [low, high] = [Infinity, -Infinity];
  for (const score of scores) {
    if (score === -Infinity) continue;
    if (score < low) low = score;
    if (score > high) high = score;
  }
  const values = new Float32Array(cellsOf(picture, view)).fill(-Infinity);
  for (let c = view.first; c < view.last; c++) {
    const cell = Math.floor((c - view.first) / view.step);
    if (scores[c] > values[cell]) values[cell] = scores[c];
  }
  const kept = picture.layers[layer].indices.subarray(at * K, (at + 1) * K).filter((chunk) => chunk >= 0);
  const marks = [...kept].map((chunk) => [cellOf(picture, view, chunk), scores[Math.floor(chunk / width)]]).filter(([cell]) => cell !== null);
  return { name, values: high === -Infinity ? [] : values, low, high, marks, empty: EMPTY };
}

// The cells that hold the needle.
function needleCells(picture, view) {
  const { needle, S } = picture, tokens = view.chunk === null ? view.step * picture.width * S : 1;
  const start = view.chunk === null ? view.first * picture.width * S : view.chunk * S;
  const first = Math.max(Math.floor((needle[0] - start) / tokens), 0), last = Math.ceil((needle[1] - start) / tokens);
  return Array.from({ length: Math.max(Math.min(last, cellsOf(picture, view)) - first, 0) }, (_, i) => first + i);
}

function drawRows(canvas, picture, rows, view, cursor) {
  const style = getComputedStyle(canvas), ratio = window.devicePixelRatio || 1;
  const [ink, soft, line, blue, red] = ["--ink", "--soft", "--line", "--kept", "--wrong"].map((name) => style.getPropertyValue(name));
  const wide = Math.max(canvas.clientWidth, 240), high = ROW * rows.length + AXIS;
  canvas.style.height = `${high}px`;
  canvas.width = wide * ratio;
  canvas.height = high * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const cells = cellsOf(picture, view), span = wide - LEFT - RIGHT, needles = needleCells(picture, view);
  const across = (cell) => LEFT + ((cell + 0.5) / Math.max(cells, 1)) * span;
  rows.forEach(({ name, values, low, high, marks, empty }, i) => {
    const top = i * ROW + 12, foot = top + ROW - 26, down = (value) => foot - ((value - low) / (high - low || 1)) * (ROW - 26);
    pen.strokeStyle = line;
    pen.strokeRect(LEFT + 0.5, i * ROW + 4.5, span, ROW - 8);
    pen.fillStyle = ink;
    pen.textAlign = "right";
    pen.font = `${name.startsWith("▸") ? "bold " : ""}12px sans-serif`;
    pen.fillText(name, LEFT - 6, top + 8);
    pen.font = "12px sans-serif";
    pen.fillStyle = soft;
    if (values.length) {
      const digits = view.chunk === null ? 1 : 3, size = Math.max(2, Math.min(span / cells - 1, 4));
      pen.fillText(high.toFixed(digits), LEFT - 6, top + 26);
      pen.fillText(low.toFixed(digits), LEFT - 6, foot + 4);
      values.forEach((value, c) => {
        if (value === -Infinity) return;
        if (view.chunk === null) pen.fillRect(across(c) - size / 2, down(value) - size / 2, size, size);
        else pen.fillRect(across(c) - size, down(value), 2 * size, foot - down(value) + 1); // a bar: a share
      });
    } else {
      pen.textAlign = "left";
      pen.fillText(empty, LEFT + 8, top + 26);
    }
    pen.strokeStyle = blue;
    pen.lineWidth = 2;
    for (const [cell, value] of marks) {
      pen.beginPath();
      pen.arc(across(cell), down(value), 5, 0, 7);
      pen.stroke();
    }
    pen.lineWidth = 1;
    pen.fillStyle = red;
    for (const cell of needles) {
      pen.beginPath(); // a triangle at the foot: the needle stands here
      pen.moveTo(across(cell), i * ROW + ROW - 12);
      pen.lineTo(across(cell) - 5, i * ROW + ROW - 4);
      pen.lineTo(across(cell) + 5, i * ROW + ROW - 4);
      pen.fill();
    }
  });
  pen.strokeStyle = ink;
  if (cursor !== null && cells) pen.strokeRect(across(cursor) - 3, 4, 6, high - AXIS - 6);
  pen.fillStyle = soft;
  pen.textAlign = "left";
  const ends = view.chunk === null ? [view.first * picture.width, Math.min(view.last * picture.width, picture.chunks) - 1] : [0, cells - 1];
  pen.fillText(`${view.chunk === null ? "chunk" : "token"} ${count(ends[0])}`, LEFT, high - 6);
  pen.textAlign = "right";
  if (ends[1] > ends[0]) pen.fillText(count(ends[1]), wide - RIGHT, high - 6);
  pen.textAlign = "center";
  pen.fillText(view.chunk === null ? "○ kept   ▲ holds the needle" : "attention inside the chunk   ▲ the needle", LEFT + span / 2, high - 6);
}

function describeCell(picture, selected, view, cell) {
  const { chunks, width } = picture, kept = keptChunks(picture, selected);
  if (view.chunk !== null) {
    const found = kept.find(({ chunk }) => chunk === view.chunk), word = picture.words[view.chunk]?.[cell] ?? "";
    const share = found ? `attention ${found.attention[cell].toFixed(3)} of 1 in this chunk` : "not kept by this layer";
    return `Token ${cell} of chunk ${count(view.chunk)} “${visible(word)}”: ${share}.`;
  }
  const first = (view.first + cell * view.step) * width, last = Math.min(first + view.step * width, chunks) - 1;
  const { values } = rowOf(picture, selected, "", view), score = values[cell] ?? -Infinity;
  const many = last > first, name = many ? `Chunks ${count(first)} to ${count(last)}, the best one` : `Chunk ${count(first)}`;
  const weights = kept.filter(({ chunk }) => first <= chunk && chunk <= last);
  const said = weights.map(({ chunk, weight }) => `, ${many ? `chunk ${count(chunk)} ` : ""}kept with weight ${weight.toFixed(3)}`).join("");
  return `${name}: ${score === -Infinity ? "not visible" : `score ${score.toFixed(2)}`}${said}.`;
}

// shown(), compared(), number(): the picture, what is kept for comparison, the number of the model. select(): changes the layer.
function makeZoom(model, selected, shown, compared, number, select) {
  const canvas = make("canvas", { class: "hsa-scores", tabindex: 0, role: "slider", "aria-label": "Scores of all chunks", "aria-valuemin": 0 });
  const crumbs = make("div", { class: "hsa-row", role: "navigation", "aria-label": "Zoom" });
  const readout = make("small"), words = make("div", { class: "hsa-words", dir: "auto" });
  let views = [], cursor = null;
  const view = () => views[views.length - 1];
  const requests = makeRequests(
    model, () => ({ content: { model: number(), chunk: view().chunk }, buffers: [] }),
    (line) => void (readout.textContent = line), (busy) => words.setAttribute("aria-busy", busy),
  );
  const draw = () => {
    if (!views.length) return;
    const picture = shown(), kept = compared();
    const rows = picture.layers.map((_, layer) => rowOf(picture, { ...selected, layer }, `${layer === selected.layer ? "▸ " : ""}layer ${layer}`, view()));
    if (kept?.picture.C === picture.C) rows.push(rowOf(kept.picture, kept, "compared", view()));
    drawRows(canvas, picture, rows, view(), cursor);
  };
  const redraw = () => {
    draw();
    const picture = shown(), [best] = keptChunks(picture, selected);
    const at = cursor ?? (view().chunk !== null ? 0 : best ? cellOf(picture, view(), best.chunk) : null);
    readout.textContent = at === null ? "" : describeCell(picture, selected, view(), at);
    canvas.setAttribute("aria-valuenow", at ?? 0);
    canvas.setAttribute("aria-valuetext", readout.textContent);
    [...words.children].forEach((span, s) => span.classList.toggle("top", s === cursor));
  };
  const point = (cell) => {
    const cells = cellsOf(shown(), view());
    if (!cells) return;
    cursor = Math.min(Math.max(cell, 0), cells - 1);
    redraw();
  };
  const open = (next, at = null) => {
    views = next;
    cursor = at;
    const picture = shown(), { chunk } = view();
    canvas.setAttribute("aria-valuemax", Math.max(cellsOf(picture, view()) - 1, 0));
    crumbs.replaceChildren(...views.map((one, i) => {
      const crumb = make("button", { type: "button" }, nameOf(picture, one));
      if (i === views.length - 1) crumb.setAttribute("aria-current", "true");
      crumb.addEventListener("click", () => (back(i), canvas.focus()));
      return crumb;
    }), ...(chunk === null && picture.C ? [closer] : []));
    const texts = chunk === null ? [] : picture.words[chunk];
    words.replaceChildren(...(texts ?? []).map((text) => make("span", {}, text)));
    redraw();
    if (!texts) requests.ask(); // Python sends the words of a chunk that no token keeps
  };
  const zoomIn = () => {
    const picture = shown(), kept = keptChunks(picture, selected);
    const at = cursor ?? (kept.length ? cellOf(picture, view(), kept[0].chunk) : 0) ?? 0;
    const next = picture.C ? inside(picture, view(), at, kept) : null;
    if (next) open([...views, next]);
  };
  const back = (to) => {
    const left = views[to + 1]; // the cursor stands where the reader was
    if (left) open(views.slice(0, to + 1), Math.floor((left.first - views[to].first) / views[to].step));
  };
  const closer = make("button", { type: "button" }, "Zoom in (Enter)");
  closer.addEventListener("click", () => (zoomIn(), canvas.focus()));
  const opened = () => {
    const { chunk, model: whose, words: texts } = model.get("opened");
    if (whose !== number() || chunk === undefined) return;
    shown().words[chunk] = texts;
    if (view().chunk === chunk) open(views, cursor);
  };
  const slide = (n) => () => point((cursor ?? 0) + n);
  canvas.addEventListener("keydown", keys({
    ArrowRight: slide(1), ArrowUp: slide(1), ArrowLeft: slide(-1), ArrowDown: slide(-1), Home: slide(-Infinity), End: slide(Infinity),
    PageUp: slide(16), PageDown: slide(-16), Enter: zoomIn, "+": zoomIn, "-": () => back(views.length - 2), Backspace: () => back(views.length - 2),
  }));
  const cellAt = (event) => {
    const box = canvas.getBoundingClientRect();
    return Math.floor(((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * cellsOf(shown(), view()));
  };
  canvas.addEventListener("pointermove", (event) => point(cellAt(event)));
  canvas.addEventListener("click", (event) => {
    const row = Math.floor((event.clientY - canvas.getBoundingClientRect().top) / ROW);
    select({ layer: Math.min(Math.max(row, 0), shown().layers.length - 1) });
  });
  canvas.addEventListener("dblclick", zoomIn);
  return {
    parts: [crumbs, canvas, readout, words], canvas, draw, redraw, opened, requests,
    point: (chunk) => view().chunk === null && point(cellOf(shown(), view(), chunk) ?? cursor ?? 0),
    reload: () => open([viewOf(0, shown().C)]),
  };
}
