// The programs of recorded launches: every tensor as a grid of numbers, which of them one program has moved so far, and
// meters of bytes and FLOP. The numbers come from Python once.

const SKY = "#56B4E9", ORANGE = "#E69F00", BLUE = "#0072B2";
const LOAD = 0, STORE = 1, KINDS = ["load", "store"];
const EDGE = 4, TITLE = 36, GAP = 24, MIN_CELL = 8, MAX_CELL = 16, MIN_WIDTH = 64, METER = 22, LABEL = 84, AMOUNT = 170;

// A launch: arrays { name, rows, columns, shape, size, moved }, moves per program { kind, array, positions, flop }, flop and
// masked of each program. moved: whether any program moves a number.
function readLaunch({ name, arrays, programs, moves, positions, flop, masked }) {
  const places = typed(positions, Int32Array), byProgram = Array.from({ length: programs }, () => []);
  const grids = arrays.map(([title, shape, size]) => {
    const columns = shape[shape.length - 1], numbers = shape.reduce((a, b) => a * b, 1);
    return { name: title, shape, size, columns, rows: numbers / columns, moved: new Uint8Array(numbers) };
  });
  let first = 0;
  for (const [program, kind, array, count, before] of moves) {
    const own = places.subarray(first, (first += count));
    byProgram[program].push({ kind, array, positions: own, flop: before });
    for (const place of own) grids[array].moved[place] = 1;
  }
  return { name, grids, programs: byProgram, flop, masked };
}

// What a program has done after `step` of its moves: bytes of loads and stores, FLOP, and the cells of each grid by kind.
function workOf({ grids, programs, flop }, program, step) {
  const moves = programs[program], bytes = [0, 0], cells = grids.map(() => new Map());
  for (const { kind, array, positions } of moves.slice(0, step)) {
    bytes[kind] += positions.length * grids[array].size;
    for (const place of positions) cells[array].set(place, kind);
  }
  return { bytes, cells, flop: step < moves.length ? (moves[step - 1]?.flop ?? 0) : flop[program], last: moves[step - 1] };
}

// Where each grid stands: side by side, in more rows only if the cells would become too small.
function layout(grids, width) {
  const wide = ({ columns }, cell) => Math.max(columns * cell, MIN_WIDTH) + GAP;
  const fits = (cell) => grids.reduce((sum, grid) => sum + wide(grid, cell), -GAP) <= width - 2 * EDGE;
  let cell = MAX_CELL;
  while (cell > MIN_CELL && !fits(cell)) cell--;
  let [x, y, high] = [EDGE, EDGE, 0];
  const boxes = grids.map((grid) => {
    if (x > EDGE && x + wide(grid, cell) - GAP > width - EDGE) [x, y, high] = [EDGE, y + high + GAP, 0];
    const box = { x, y: y + TITLE, cell };
    x += wide(grid, cell);
    high = Math.max(high, TITLE + grid.rows * cell);
    return box;
  });
  return { boxes, height: y + high };
}

function drawLaunch(canvas, width, launch, program, step) {
  const { boxes, height } = layout(launch.grids, width), work = workOf(launch, program, step);
  const { pen, look } = cleared(canvas, width, height + GAP + 3 * METER + EDGE);
  launch.grids.forEach((grid, g) => drawGrid(pen, look, boxes[g], grid, work.cells[g], work.last?.array === g ? work.last.positions : []));
  const all = workOf(launch, program, launch.programs[program].length);
  const meters = [["loaded", work.bytes[LOAD], all.bytes[LOAD], " bytes", ORANGE], ["stored", work.bytes[STORE], all.bytes[STORE], " bytes", BLUE],
    ["computed", work.flop, all.flop, " FLOP", look.dark ? "#CCCCCC" : "#767676"]];
  meters.forEach((meter, row) => drawMeter(pen, look, width, height + GAP + row * METER, meter));
  return boxes;
}

function drawGrid(pen, look, { x, y, cell }, { name, shape, rows, columns, moved }, cells, last) {
  pen.fillStyle = look.ink;
  pen.textAlign = "left";
  pen.font = "bold 13px sans-serif";
  pen.fillText(name, x, y - 20);
  pen.font = "12px sans-serif";
  pen.fillText(`[${shape.join(", ")}]`, x, y - 6);
  const line = cell > 7 ? 1 : 0.5;
  for (let place = 0; place < rows * columns; place++) {
    const kind = cells.get(place);
    pen.fillStyle = kind === undefined ? (moved[place] ? SKY : look.pale) : kind === LOAD ? ORANGE : BLUE;
    pen.fillRect(x + (place % columns) * cell, y + Math.floor(place / columns) * cell, cell - line, cell - line);
  }
  pen.strokeStyle = look.ink; // a frame around what the last move has moved
  pen.lineWidth = 1.5;
  for (const place of last) pen.strokeRect(x + (place % columns) * cell, y + Math.floor(place / columns) * cell, cell - line, cell - line);
}

function drawMeter(pen, look, width, y, [name, done, all, unit, color]) {
  const room = Math.max(Math.min(width - LABEL - AMOUNT, 520), 40);
  pen.fillStyle = look.ink;
  pen.font = "13px sans-serif";
  pen.textAlign = "left";
  pen.fillText(name, EDGE, y + 13);
  pen.fillText(`${done.toLocaleString("en")} of ${all.toLocaleString("en")}${unit}`, LABEL + room + 8, y + 13);
  pen.fillStyle = look.pale;
  pen.fillRect(LABEL, y + 2, room, METER - 8);
  pen.fillStyle = color;
  pen.fillRect(LABEL, y + 2, all ? (room * done) / all : 0, METER - 8);
}

// The words for a place in a tensor: its index in every dimension.
function indexOf({ shape }, place) {
  const index = [];
  for (const size of [...shape].reverse()) {
    index.unshift(place % size);
    place = Math.floor(place / size);
  }
  return index.join(", ");
}

function movers({ programs }, array, place) {
  const found = KINDS.map((_, kind) => programs.flatMap((moves, program) =>
    moves.some((move) => move.kind === kind && move.array === array && move.positions.includes(place)) ? [program] : []));
  const shown = (list) => (list.length > 8 ? `${list.length} programs, ${list[0]} to ${list[list.length - 1]}` : `program ${list.join(", ")}`);
  return { found, words: KINDS.flatMap((kind, k) => (found[k].length ? [`${kind === "load" ? "loaded" : "stored"} by ${shown(found[k])}`] : [])).join("; ") || "moved by no program" };
}

function describe(launch, program, step) {
  const moves = launch.programs[program], work = workOf(launch, program, step), masked = launch.masked[program];
  const move = work.last;
  const now = !moves.length ? "It moves nothing." : !move ? "It has not begun."
    : `Move ${step} of ${moves.length}: it ${KINDS[move.kind]}s ${move.positions.length} numbers of ${launch.grids[move.array].name}.`;
  const out = masked ? ` Masks keep out ${masked} addresses.` : "";
  const sum = `${work.bytes[LOAD].toLocaleString("en")} bytes loaded, ${work.bytes[STORE].toLocaleString("en")} stored, ${work.flop.toLocaleString("en")} FLOP`;
  return `Kernel ${launch.name}, program ${program} of ${launch.programs.length}. ${now} So far: ${sum}.${out}`;
}

function render({ model, el }) {
  const canvas = sliderCanvas(model), line = document.createElement("div"), menu = document.createElement("select");
  line.style.cssText = "padding: 4px 0; min-height: 3em; font-size: 14px";
  const label = document.createElement("label");
  label.style.cssText = "padding: 0 0 6px; font-size: 13px";
  label.append("Kernel ", menu);
  menu.dataset.lmSuppressShortcuts = "true";
  let launches, boxes;
  const shown = () => {
    const launch = launches[model.get("launch")], program = Math.min(model.get("program"), launch.programs.length - 1);
    const moves = launch.programs[program].length, step = model.get("step");
    return { launch, program, moves, step: step < 0 ? moves : Math.min(step, moves) };
  };
  const set = (name) => (value) => {
    model.set(name, value);
    model.save_changes();
  };
  const player = makePlayer({ name: "load or store of the program", last: () => shown().moves, get: () => shown().step, set: set("step") });
  el.append(label, canvas, player.root, line);
  menu.addEventListener("change", () => set("launch")(menu.selectedIndex));
  const load = () => {
    launches = model.get("data").launches.map(readLaunch);
    menu.replaceChildren(...launches.map(({ name }) => new Option(name)));
    label.style.display = launches.length < 2 ? "none" : "block";
  };
  const redraw = (width) => {
    const { launch, program, step } = shown();
    menu.selectedIndex = model.get("launch");
    boxes = drawLaunch(canvas, width, launch, program, step);
    line.textContent = describe(launch, program, step);
    canvas.setAttribute("aria-valuemax", launch.programs.length - 1);
    canvas.setAttribute("aria-valuenow", program);
    canvas.setAttribute("aria-valuetext", line.textContent);
    player.redraw();
  };
  const whole = () => {
    player.end();
    set("step")(-1); // another program is shown with all its moves
  };
  for (const change of ["change:program", "change:launch"]) model.on(change, whole);
  const last = () => shown().launch.programs.length - 1;
  const { move, end } = live({
    model, canvas, name: "program", last, page: (program, way) => program + 4 * way, load, redraw, also: ["launch", "step"],
    keys: { " ": player.toggle, ".": () => player.step(1), ",": () => player.step(-1) },
  });
  const cellAt = (x, y) => {
    const { launch } = shown();
    for (const [array, box] of boxes.entries()) {
      const column = Math.floor((x - box.x) / box.cell), row = Math.floor((y - box.y) / box.cell), grid = launch.grids[array];
      if (column >= 0 && column < grid.columns && row >= 0 && row < grid.rows) return { launch, grid, array, place: row * grid.columns + column };
    }
  };
  const tip = tooltips(canvas, (x, y) => {
    const cell = cellAt(x, y);
    return cell && `${cell.grid.name}[${indexOf(cell.grid, cell.place)}]: ${movers(cell.launch, cell.array, cell.place).words}`;
  }, () => "← and →: another program. Space: play. Comma and period: one load or store back or on.");
  canvas.addEventListener("click", ({ offsetX, offsetY }) => {
    const cell = cellAt(offsetX, offsetY);
    if (!cell) return;
    const [loads, stores] = movers(cell.launch, cell.array, cell.place).found, [first] = [...stores, ...loads];
    if (first !== undefined) move(first);
  });
  return () => {
    end();
    tip.end();
    player.end();
    for (const change of ["change:program", "change:launch"]) model.off(change, whole);
  };
}

export default { render };
