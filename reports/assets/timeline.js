// The timeline: a canvas that stays quick at 100 000 events. Columns come in base64 (reports/timeline.py writes them);
// a binary search finds what is in sight, and neighbours thinner than half a pixel are drawn as one.
"use strict";
(() => {
  const canvas = document.getElementById("timeline-canvas");
  if (!canvas) return;
  const view = document.getElementById("timeline-view");
  const detail = document.getElementById("timeline-detail");
  const tip = view.querySelector(".tip");
  const data = JSON.parse(document.getElementById("timeline-data").textContent);
  const pen = canvas.getContext("2d");

  // ---- data -------------------------------------------------------------------------------------------------------
  const column = (text, Kind) => {
    const binary = atob(text);
    const bytes = new Uint8Array(binary.length);
    for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
    return new Kind(bytes.buffer);
  };
  const sources = data.sources.map((s) => {
    const source = {
      name: s.name, label: s.label, end_s: s.end_s, offsets: s.offsets,
      start: column(s.start, Float64Array), wait: column(s.wait, Float32Array), work: column(s.work, Float32Array),
      bytes: column(s.bytes, Float32Array), op: column(s.op, Uint8Array), stage: column(s.stage, Uint16Array),
      microbatch: column(s.microbatch, Int32Array),
    };
    // Transfers of one lane may overlap, so ends are not in order; the latest end so far is, and can be searched.
    source.latest = new Float64Array(source.start.length);
    for (let lane = 0; lane + 1 < s.offsets.length; lane++) {
      let latest = -Infinity;
      for (let i = s.offsets[lane]; i < s.offsets[lane + 1]; i++) {
        latest = Math.max(latest, source.start[i] + source.wait[i] + source.work[i]);
        source.latest[i] = latest;
      }
    }
    return source;
  });
  const end = Math.max(1e-9, ...sources.map((s) => s.latest.reduce((a, b) => Math.max(a, b), s.end_s)));
  const domain = [0, end * 1.02];
  const narrowest = Math.max(domain[1] * 1e-6, 1e-9);

  const firstAt = (values, low, high, least) => { // first index in [low, high) whose value is at least `least`
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < least) low = middle + 1; else high = middle;
    }
    return low;
  };
  const ready = (s, i) => s.start[i] + s.wait[i];
  const label = (s, i) => {
    const { short } = data.ops[s.op[i]];
    return short + (s.microbatch[i] < 0 || short === "" ? "" : s.microbatch[i]);
  };

  // ---- state ------------------------------------------------------------------------------------------------------
  const shown = { predicted: true, measured: true, links: true };
  let [from, to] = domain;
  let rows = [];      // what is on the screen: { source, device, lane, y, height }
  let width = 0, height = 0, gutter = 0, axis = 24, foot = 0;
  let hovered = null, pinned = null; // { row, index }
  let colours = {}, hatch = null, waiting = false;

  const readColours = () => {
    const ops = data.ops.map((op) => page.colour(op.colour));
    const inks = data.ops.map((op) => page.colour(op.colour.replace("--role-", "--on-role-"), "#101418"));
    colours = {
      ops, onOps: inks, paper: page.colour("--paper"), ink: page.colour("--ink"),
      muted: page.colour("--muted"), rule: page.colour("--rule"), idle: page.colour("--idle"), accent: page.colour("--accent"),
    };
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const brush = tile.getContext("2d");
    brush.fillStyle = colours.idle;
    brush.fillRect(0, 0, 6, 6);
    brush.strokeStyle = page.colour("--waiting");
    brush.lineWidth = 1.2;
    brush.beginPath();
    for (const x of [-6, 0, 6]) { brush.moveTo(x - 1, 7); brush.lineTo(x + 7, -1); }
    brush.stroke();
    hatch = pen.createPattern(tile, "repeat");
  };

  const arrange = () => {
    const devices = data.devices.length;
    const inSight = sources.filter((s) => shown[s.name]);
    const compute = Math.max(6, Math.min(22, Math.floor(900 / Math.max(1, devices * inSight.length))));
    const link = compute > 12 ? 5 : 2;
    width = view.clientWidth;
    gutter = Math.min(132, Math.max(58, width * 0.11));
    rows = [];
    let y = axis + 4;
    for (let device = 0; device < devices; device++) {
      for (const source of inSight) {
        rows.push({ source, device, lane: 0, y, height: compute });
        y += compute + 1;
        if (shown.links) {
          rows.push({ source, device, lane: 1, y, height: link });
          y += link + 1;
        }
        y += 2;
      }
      y += compute > 12 ? 9 : 3;
    }
    foot = 4 + 16 * inSight.length;
    height = y + foot;
    const ratio = Math.min(window.devicePixelRatio || 1, 16000 / height);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  };

  // ---- drawing ----------------------------------------------------------------------------------------------------
  const x = (time) => gutter + ((time - from) / (to - from)) * (width - gutter);
  const timeAt = (px) => from + ((px - gutter) / (width - gutter)) * (to - from);
  let rectangles = 0;

  const drawLane = (row) => {
    const { source: s, y, height: h } = row;
    const lane = 2 * row.device + row.lane;
    const scale = (width - gutter) / (to - from);
    const weights = new Float64Array(data.ops.length + 1); // the last is waiting
    const WAIT = data.ops.length;
    let left = -1, right = -1;
    const fill = (x0, w, op) => {
      pen.fillStyle = op === WAIT ? hatch : colours.ops[op];
      pen.fillRect(x0, y, w, h);
      rectangles++;
    };
    const flush = () => {
      if (left < 0) return;
      let most = 0;
      for (let k = 1; k < weights.length; k++) if (weights[k] > weights[most]) most = k;
      fill(left, Math.max(0.5, right - left), most);
      weights.fill(0);
      left = -1;
    };
    const put = (t0, t1, op) => {
      const x0 = Math.max(gutter - 1, gutter + (t0 - from) * scale), x1 = Math.min(width + 1, gutter + (t1 - from) * scale);
      const w = x1 - x0;
      if (!(w > 0)) return 0;
      if (w >= 0.5) {
        flush();
        fill(x0, w > 3 && op !== WAIT && row.lane === 0 ? w - 0.5 : w, op);
      } else {
        if (left >= 0 && x0 > left + 1) flush();
        if (left < 0) left = x0;
        right = Math.max(x1, left);
        weights[op] += w;
      }
      return w;
    };
    pen.fillStyle = colours.idle;
    const [a, b] = [Math.max(gutter, x(0)), Math.min(width, x(s.end_s))];
    if (b > a) pen.fillRect(a, y, b - a, h);
    const last = s.offsets[lane + 1];
    const dim = pinned && pinned.row.source.microbatch[pinned.index];
    for (let i = firstAt(s.latest, s.offsets[lane], last, from); i < last && s.start[i] < to; i++) {
      const begin = ready(s, i), op = s.op[i];
      if (s.wait[i] > 0) put(s.start[i], begin, WAIT);
      const other = pinned !== null && dim >= 0 && s.microbatch[i] !== dim;
      if (other) { flush(); pen.globalAlpha = 0.22; }
      else if (row.lane === 1) pen.globalAlpha = 0.8;
      const w = put(begin, begin + s.work[i], op);
      if (other) flush();
      pen.globalAlpha = 1;
      if (w > 20 && row.lane === 0 && h >= 11) {
        const text = label(s, i), room = pen.measureText(text).width;
        if (text && room + 3 < w) {
          pen.fillStyle = other ? colours.muted : colours.onOps[op];
          pen.fillText(text, Math.max(gutter, gutter + (begin - from) * scale) + Math.min(w, width) / 2 - room / 2, y + h / 2 + 0.5);
        }
      }
    }
    flush();
  };

  const drawAxis = () => {
    const span = to - from;
    const rough = span / Math.max(2, Math.floor((width - gutter) / 80));
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= rough);
    const [factor, unit] = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]].find(([f]) => to >= f) || [1e-9, "ns"];
    const decimals = Math.max(0, Math.ceil(-Math.log10(step / factor) - 1e-9));
    pen.textAlign = "center";
    for (let k = Math.ceil(from / step); k * step <= to; k++) {
      const px = x(k * step);
      pen.fillStyle = colours.rule;
      pen.fillRect(px, axis - 4, 1, height - axis - foot + 4);
      pen.fillStyle = colours.muted;
      const text = `${((k * step) / factor).toFixed(decimals)} ${unit}`;
      const half = pen.measureText(text).width / 2;
      if (px + half <= width && px - half >= gutter - 16) pen.fillText(text, px, axis / 2);
    }
    pen.textAlign = "left";
  };

  // Below the lanes each source's end has a line of its own, so that two ends close together can both be read.
  const drawEnds = () => {
    sources.filter((s) => shown[s.name]).forEach((s, k) => {
      if (s.end_s < from || s.end_s > to) return;
      const px = x(s.end_s), text = `${s.label} ${page.seconds(s.end_s)}`, room = pen.measureText(text).width + 6;
      const y = height - foot + 8 + 16 * k;
      pen.strokeStyle = colours.ink;
      pen.setLineDash(s.name === "predicted" ? [4, 3] : []);
      pen.beginPath();
      pen.moveTo(px, axis);
      pen.lineTo(px, y + 6);
      pen.stroke();
      pen.setLineDash([]);
      pen.fillStyle = colours.ink;
      pen.fillText(text, px - room >= gutter ? px - room : px + 6, y);
    });
  };

  const clipped = (text, room) => {
    if (pen.measureText(text).width <= room) return text;
    let kept = text;
    while (kept && pen.measureText(`${kept}…`).width > room) kept = kept.slice(0, -1);
    return `${kept}…`;
  };
  const drawNames = () => {
    pen.fillStyle = colours.paper;
    pen.fillRect(0, axis, gutter, height - axis);
    let device = -1;
    for (const row of rows) {
      if (row.lane === 1) continue;
      const roomy = row.height >= 11, first = row.device !== device;
      const middle = row.y + row.height / 2 + 0.5;
      const tag = gutter > 100 ? row.source.label : row.source.label.slice(0, 4);
      const both = sources.length > 1 && roomy;
      pen.font = small;
      const tagRoom = both ? pen.measureText(tag).width + 14 : 8;
      if (both) {
        pen.fillStyle = colours.muted;
        pen.fillText(tag, gutter - tagRoom + 8, middle);
      }
      if (first && (roomy || row.height >= 8 || row.device % 4 === 0)) {
        device = row.device;
        const of = data.devices[row.device];
        pen.font = roomy ? bold : tiny;
        pen.fillStyle = colours.ink;
        pen.fillText(clipped(of.name, gutter - tagRoom), 0, middle);
      }
      device = row.device;
    }
    pen.font = small;
  };
  const outline = (place, colour) => {
    if (!place || !rows.includes(place.row)) return;
    const { row: { source: s, y, height: h }, index: i } = place;
    const x0 = Math.max(gutter, x(ready(s, i))), x1 = Math.min(width, x(ready(s, i) + s.work[i]));
    if (x1 < x0) return;
    pen.strokeStyle = colour;
    pen.lineWidth = 2;
    pen.strokeRect(x0 - 0.5, y - 0.5, Math.max(2, x1 - x0) + 1, h + 1);
    pen.lineWidth = 1;
  };
  let small = "", bold = "", tiny = "";

  const draw = () => {
    const began = performance.now();
    waiting = false;
    rectangles = 0;
    pen.clearRect(0, 0, width, height);
    pen.textBaseline = "middle";
    pen.font = small;
    drawAxis();
    for (const row of rows) drawLane(row);
    drawEnds();
    outline(pinned, colours.ink);
    outline(hovered, colours.accent);
    drawNames();
    Object.assign(canvas.dataset, {
      visibleFrom: from, visibleTo: to, rows: rows.length, rectangles, drawMs: (performance.now() - began).toFixed(2),
    });
  };
  const redraw = () => {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  };

  // ---- moving -----------------------------------------------------------------------------------------------------
  const show = (a, b) => {
    const span = Math.min(domain[1] - domain[0], Math.max(narrowest, b - a));
    a = Math.min(Math.max(domain[0], (a + b - span) / 2), domain[1] - span);
    [from, to] = [a, a + span];
    redraw();
  };
  const zoom = (factor, centre = (from + to) / 2) => show(centre - (centre - from) / factor, centre + (to - centre) / factor);
  const pan = (share) => show(from + share * (to - from), to + share * (to - from));

  const at = (px, py) => {
    const row = rows.find((r) => py >= r.y - 1 && py <= r.y + r.height + 1);
    if (!row || px < gutter) return null;
    const s = row.source, lane = 2 * row.device + row.lane, time = timeAt(px), near = (2 * (to - from)) / (width - gutter);
    let best = null, distance = near;
    for (let i = firstAt(s.latest, s.offsets[lane], s.offsets[lane + 1], time - near); i < s.offsets[lane + 1] && s.start[i] <= time + near; i++) {
      const away = Math.max(s.start[i] - time, time - (ready(s, i) + s.work[i]), 0);
      if (away <= distance) [best, distance] = [i, away];
    }
    return best === null ? null : { row, index: best };
  };
  const words = ({ row, index: i }) => {
    const s = row.source, op = data.ops[s.op[i]];
    const lines = [
      `${s.stage[i]}${op.name}${s.microbatch[i] < 0 ? "" : s.microbatch[i]} on ${data.devices[row.device].name}, ${s.label}`,
      `${op.words}, stage ${s.stage[i]}${s.microbatch[i] < 0 ? "" : `, micro-batch ${s.microbatch[i]}`}`,
      `start ${page.seconds(s.start[i])}, wait ${page.seconds(s.wait[i])}, duration ${page.seconds(s.work[i])}`,
    ];
    if (s.bytes[i] > 0) lines.push(`${page.size(s.bytes[i])}${s.work[i] > 0 ? `, ${page.size(s.bytes[i] / s.work[i])}/s` : ""}`);
    return lines;
  };
  const hover = (place, px, py) => {
    if (place?.row === hovered?.row && place?.index === hovered?.index && px === undefined) return;
    hovered = place;
    tip.hidden = !place || px === undefined;
    if (!tip.hidden) {
      tip.textContent = words(place).join("\n");
      tip.style.left = `${Math.max(0, Math.min(px + 14, width - tip.offsetWidth - 4))}px`;
      tip.style.top = `${py + 18}px`;
    }
    redraw();
  };
  const pin = (place) => {
    const same = place && pinned && place.row === pinned.row && place.index === pinned.index;
    pinned = same ? null : place;
    detail.textContent = pinned ? `${words(pinned).join("; ")}. Its micro-batch is lit everywhere; Escape ends this.` : help;
    redraw();
  };
  const help = "Wheel or + and − zoom, drag or arrow keys move, Home shows the whole step; click an action to follow its micro-batch.";

  // Step through the actions of a lane with the keyboard; the description is read aloud.
  const choose = (rowStep, step) => {
    if (!rows.length) return;
    let row = pinned && rows.includes(pinned.row) ? pinned.row : null;
    let index = pinned ? pinned.index : -1;
    if (!row) [row, rowStep] = [rows[0], 0];
    const place = (r, time) => {
      const lane = 2 * r.device + r.lane, [low, high] = [r.source.offsets[lane], r.source.offsets[lane + 1]];
      return low === high ? -1 : Math.min(high - 1, firstAt(r.source.start, low, high, time));
    };
    if (rowStep || index < 0) {
      const time = index < 0 ? from : row.source.start[index];
      let k = rows.indexOf(row), found = -1;
      do { k += rowStep; } while (rows[k] && (found = place(rows[k], time)) < 0 && rowStep);
      if (found < 0) return;
      [row, index] = [rows[k], found];
    } else {
      const lane = 2 * row.device + row.lane;
      index = Math.min(row.source.offsets[lane + 1] - 1, Math.max(row.source.offsets[lane], index + step));
    }
    pinned = null;
    pin({ row, index });
    const time = ready(row.source, index);
    if (time < from || time > to) show(time - (to - from) / 2, time + (to - from) / 2);
  };

  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  // Who scrolls down the page must not be caught by the canvas on the way: a wheel already turning goes on scrolling.
  let scrolled = -Infinity;
  addEventListener("scroll", () => { scrolled = performance.now(); }, { passive: true });
  canvas.addEventListener("wheel", (event) => {
    const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY);
    const whole = from <= domain[0] && to >= domain[1];
    if (!event.ctrlKey && (performance.now() - scrolled < 350 || (whole && (sideways || event.deltaY > 0)))) return;
    event.preventDefault();
    if (sideways) pan(event.deltaX / width);
    else zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0022)), timeAt(Math.max(gutter, point(event)[0])));
    hover(null);
  }, { passive: false });

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    const [px] = point(event);
    drag = { px, from, to, moved: false };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    const [px, py] = point(event);
    if (!drag) return hover(at(px, py), px, py);
    if (!drag.moved && Math.abs(px - drag.px) < 4) return undefined;
    drag.moved = true;
    canvas.classList.add("panning");
    tip.hidden = true;
    const shift = ((drag.px - px) / (width - gutter)) * (drag.to - drag.from);
    return show(drag.from + shift, drag.to + shift);
  });
  const release = (event) => {
    if (drag && !drag.moved && event.type === "pointerup") pin(at(...point(event)));
    drag = null;
    canvas.classList.remove("panning");
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const action = {
      ArrowLeft: () => pan(-0.2), ArrowRight: () => pan(0.2), "+": () => zoom(1.6), "=": () => zoom(1.6), "-": () => zoom(1 / 1.6),
      Home: () => show(...domain), ArrowUp: () => choose(-1, 0), ArrowDown: () => choose(1, 0), ",": () => choose(0, -1),
      ".": () => choose(0, 1), Escape: () => { hover(null); pin(null); },
    }[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => ({ in: () => zoom(1.6), out: () => zoom(1 / 1.6), reset: () => show(...domain) })[button.dataset.zoom]());
  }
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => {
      const name = button.dataset.show, on = !shown[name];
      if (!on && name !== "links" && sources.filter((s) => shown[s.name]).length < 2) return; // one of them stays
      shown[name] = on;
      button.setAttribute("aria-pressed", String(on));
      [pinned, hovered] = [null, null];
      tip.hidden = true;
      arrange();
      redraw();
    });
  }

  // ---- beginning --------------------------------------------------------------------------------------------------
  view.hidden = detail.hidden = view.parentElement.querySelector(".toolbar").hidden = false;
  detail.textContent = help;
  const family = getComputedStyle(document.body).fontFamily;
  [small, bold, tiny] = [`11px ${family}`, `600 12px ${family}`, `8px ${family}`];
  page.onTheme(() => { readColours(); draw(); });
  new ResizeObserver(() => {
    if (view.clientWidth !== width) { arrange(); draw(); }
  }).observe(view);
  readColours();
  arrange();
  draw();
})();
