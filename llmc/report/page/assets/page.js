"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // --- colours: as the system has them, light, dark ---------------------------------------------------------------
  const themes = ["auto", "light", "dark"];
  const said = { auto: "as the system has them", light: "light", dark: "dark" };
  const button = document.getElementById("theme");
  const remember = (theme) => { try { localStorage.setItem("llmc-theme", theme); } catch { /* a file may not */ } };
  const remembered = () => { try { return localStorage.getItem("llmc-theme"); } catch { return null; } };
  let theme = "auto";
  function setTheme(wanted) {
    theme = themes.includes(wanted) ? wanted : "auto";
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    button.setAttribute("aria-label", `Colours: ${said[theme]}`);
    button.querySelector("span").textContent = theme[0].toUpperCase() + theme.slice(1);
    redraw();
  }
  button.addEventListener("click", () => {
    setTheme(themes[(themes.indexOf(theme) + 1) % themes.length]);
    remember(theme);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // --- readouts ---------------------------------------------------------------------------------------------------
  const tip = document.getElementById("tip");
  function show(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(x + 14, 8), innerWidth - box.width - 8);
    const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(Math.max(top, 4))}px)`;
  }
  let marked = [];
  function unmark() {
    marked.forEach((undo) => undo());
    marked = [];
    tip.hidden = true;
  }
  function overCell(cell, event) {
    const table = cell.closest("table");
    const row = cell.parentElement.cells[0].textContent;
    const head = table.tHead.rows[0].cells[cell.cellIndex].textContent;
    const more = cell.dataset.more ? `\n${cell.dataset.more}` : "";
    show(`${table.dataset.across} ${head}, ${row}\n${cell.textContent || "no number"}${more}`, event.clientX, event.clientY);
  }
  function overHover(band, event) {
    band.classList.add("on");
    marked.push(() => band.classList.remove("on"));
    for (const pair of band.dataset.dots.trim().split(" ").filter(Boolean)) {
      const [colour, height] = pair.split(":");
      const dot = document.createElement("i");
      dot.className = `dot s${colour}`;
      dot.style.left = `${band.dataset.at}%`;
      dot.style.bottom = `${height}%`;
      band.parentElement.append(dot);
      marked.push(() => dot.remove());
    }
    show(band.dataset.tip, event.clientX, event.clientY);
  }
  document.addEventListener("pointermove", (event) => {
    unmark();
    const target = event.target;
    if (!(target instanceof Element)) return;
    if (target.matches(".heat td:not(.mean)")) overCell(target, event);
    else if (target.matches(".hover")) overHover(target, event);
    else if (target.dataset && target.dataset.tip) show(target.dataset.tip, event.clientX, event.clientY);
    else if (target.matches("canvas.surface")) overSurface(target, event);
  });
  document.addEventListener("scroll", unmark, { passive: true });
  document.addEventListener("pointerleave", unmark);

  // --- tabs, copying, where we are --------------------------------------------------------------------------------
  function select(tab) {
    const list = tab.parentElement;
    for (const one of all("[role=tab]", list)) {
      const chosen = one === tab;
      one.setAttribute("aria-selected", String(chosen));
      one.tabIndex = chosen ? 0 : -1;
      document.getElementById(one.getAttribute("aria-controls")).hidden = !chosen;
    }
    redraw();
  }
  for (const list of all("[role=tablist]")) {
    const tabs = all("[role=tab]", list);
    tabs.forEach((tab, index) => {
      tab.addEventListener("click", () => select(tab));
      tab.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const next = tabs[(index + step + tabs.length) % tabs.length];
        next.focus();
        select(next);
      });
    });
  }
  for (const copy of all("[data-copy]")) {
    copy.addEventListener("click", async () => {
      const source = document.getElementById(copy.dataset.copy);
      try {
        await navigator.clipboard.writeText(source.textContent);
      } catch { // a file opened from the disk may not; selected text can be copied by hand
        getSelection().selectAllChildren(source);
        document.execCommand("copy");
      }
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1400);
    });
  }
  const links = new Map(all(".toc a").map((link) => [link.hash.slice(1), link]));
  const sections = all("main > section[id]").filter((section) => links.has(section.id));
  function whereWeAre() {
    const passed = sections.filter((section) => section.getBoundingClientRect().top < 140);
    const current = passed[passed.length - 1] || sections[0];
    links.forEach((link, id) => {
      if (current && id === current.id) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    });
  }
  document.addEventListener("scroll", whereWeAre, { passive: true });

  // --- activation surfaces ----------------------------------------------------------------------------------------
  const surfaces = all("canvas.surface");
  let view = "surface";
  const cellsOf = new WeakMap();
  function cells(canvas) {
    if (!cellsOf.has(canvas)) cellsOf.set(canvas, Uint8Array.from(atob(canvas.dataset.cells), (byte) => byte.charCodeAt(0)));
    return cellsOf.get(canvas);
  }
  // A cell's byte is 255 times the square root of its share of the largest magnitude.
  const share = (byte) => (byte / 255) ** 2;

  function ramp() {
    const style = getComputedStyle(root);
    const stops = Array.from({ length: 10 }, (_, index) => rgb(style.getPropertyValue(`--h${index}`).trim()));
    return Array.from({ length: 256 }, (_, byte) => {
      const place = (byte / 255) * 9, below = Math.min(Math.floor(place), 8), part = place - below;
      return stops[below].map((value, index) => Math.round(value + (stops[below + 1][index] - value) * part));
    });
  }
  const rgb = (hex) => [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));

  // Channels go right and down, tokens left and down, magnitude up.
  function projection(width, height) {
    const left = 0.36 * width, top = 0.5 * height, rise = 0.46 * height;
    const across = [0.58 * width, 0.26 * height], along = [-0.31 * width, 0.185 * height];
    return {
      rise,
      place: (u, v, z) => [left + u * across[0] + v * along[0], top + u * across[1] + v * along[1] - z * rise],
    };
  }
  function prepare(canvas) {
    const box = canvas.getBoundingClientRect();
    if (!box.width) return null;
    const density = Math.min(devicePixelRatio || 1, 2);
    canvas.width = Math.round(box.width * density);
    canvas.height = Math.round(box.height * density);
    const context = canvas.getContext("2d");
    context.scale(density, density);
    return { context, width: box.width, height: box.height };
  }
  function size(canvas) { return [Number(canvas.dataset.rows), Number(canvas.dataset.columns)]; }

  function drawSurface(canvas, { context, width, height }, colours, ink) {
    const [rows, columns] = size(canvas), data = cells(canvas);
    const { place } = projection(width, height);
    const at = (row, column) => place(column / Math.max(columns - 1, 1), row / Math.max(rows - 1, 1), share(data[row * columns + column]));
    frame(context, place, canvas, ink);
    context.lineJoin = "round";
    for (let row = 0; row + 1 < rows; row++) {
      for (let column = 0; column + 1 < columns; column++) {
        const byte = Math.max(data[row * columns + column], data[row * columns + column + 1], data[(row + 1) * columns + column], data[(row + 1) * columns + column + 1]);
        const corners = [at(row, column), at(row, column + 1), at(row + 1, column + 1), at(row + 1, column)];
        context.beginPath();
        corners.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
        context.closePath();
        const colour = colours[Math.round(255 * share(byte) ** 0.75)];
        context.fillStyle = context.strokeStyle = `rgb(${colour})`;
        context.lineWidth = 0.7;
        context.fill();
        context.stroke();
      }
    }
    // A light net, so that the shape of what is flat can be seen too.
    context.strokeStyle = ink.net;
    context.lineWidth = 0.5;
    const every = Math.max(1, Math.round(columns / 32));
    for (let column = 0; column < columns; column += every) line(context, Array.from({ length: rows }, (_, row) => at(row, column)));
    for (let row = 0; row < rows; row += Math.max(1, Math.round(rows / 16))) line(context, Array.from({ length: columns }, (_, column) => at(row, column)));
  }
  function line(context, points) {
    context.beginPath();
    points.forEach(([x, y], index) => (index ? context.lineTo(x, y) : context.moveTo(x, y)));
    context.stroke();
  }
  function frame(context, place, canvas, ink) {
    context.strokeStyle = ink.line;
    context.lineWidth = 1;
    line(context, [place(0, 0, 0), place(1, 0, 0), place(1, 1, 0), place(0, 1, 0), place(0, 0, 0)]);
    line(context, [place(0, 1, 0), place(0, 1, 1)]);
    line(context, [place(0, 1, 1), place(0, 0, 1), place(0, 0, 0)]);
    line(context, [place(0, 0, 1), place(1, 0, 1), place(1, 0, 0)]);
    context.fillStyle = ink.text;
    context.font = "11.5px Inter, 'Helvetica Neue', 'Segoe UI', 'Liberation Sans', Arial, sans-serif";
    const peak = place(0, 1, 1);
    context.textAlign = "left";
    context.fillText(plain(Number(canvas.dataset.peak)), peak[0] - 2, peak[1] - 6);
    const channels = place(0.52, 1, 0), tokens = place(1, 0.5, 0);
    context.textAlign = "right";
    context.fillText("channels →", channels[0] - 10, channels[1] + 15);
    context.textAlign = "left";
    context.fillText("← tokens", tokens[0] + 12, tokens[1] + 12);
  }
  function drawMap(canvas, { context, width, height }, colours, ink) {
    const [rows, columns] = size(canvas), data = cells(canvas);
    const image = new ImageData(columns, rows);
    data.forEach((byte, index) => image.data.set([...colours[Math.round(255 * share(byte) ** 0.75)], 255], 4 * index));
    const small = document.createElement("canvas");
    small.width = columns;
    small.height = rows;
    small.getContext("2d").putImageData(image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 4, width, height - 26);
    context.fillStyle = ink.text;
    context.font = "11.5px Inter, 'Helvetica Neue', 'Segoe UI', 'Liberation Sans', Arial, sans-serif";
    context.fillText("channels →", 0, height - 7);
    context.textAlign = "right";
    context.fillText("tokens ↓", width, height - 7);
  }
  function plain(value) {
    return value >= 100 ? value.toFixed(0) : value >= 1 ? value.toPrecision(3) : value === 0 ? "0" : value.toPrecision(2);
  }
  function overSurface(canvas, event) {
    const box = canvas.getBoundingClientRect();
    const found = nearest(canvas, event.clientX - box.left, event.clientY - box.top, box.width, box.height);
    if (!found) return;
    const [row, column] = found, [rows, columns] = size(canvas);
    const span = (index, count, total) => {
      const first = Math.floor((index * total) / count), last = Math.max(first, Math.floor(((index + 1) * total) / count) - 1);
      return first === last ? `${first}` : `${first}–${last}`;
    };
    const value = Number(canvas.dataset.peak) * share(cells(canvas)[row * columns + column]);
    show(`channels ${span(column, columns, Number(canvas.dataset.channels))}\ntokens ${span(row, rows, Number(canvas.dataset.tokens))}\nlargest |x| ${plain(value)}`, event.clientX, event.clientY);
  }
  function nearest(canvas, x, y, width, height) {
    const [rows, columns] = size(canvas), data = cells(canvas);
    if (view === "map") {
      const row = Math.floor(((y - 4) / (height - 26)) * rows), column = Math.floor((x / width) * columns);
      return row >= 0 && row < rows && column >= 0 && column < columns ? [row, column] : null;
    }
    const { place } = projection(width, height);
    let best = null, least = 14 ** 2;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const [px, py] = place(column / Math.max(columns - 1, 1), row / Math.max(rows - 1, 1), share(data[row * columns + column]));
        const distance = (px - x) ** 2 + (py - y) ** 2;
        if (distance <= least) [best, least] = [[row, column], distance];
      }
    }
    return best;
  }
  function draw(canvas) {
    const prepared = prepare(canvas);
    if (!prepared) return;
    const style = getComputedStyle(root), dark = style.colorScheme === "dark";
    const ink = { text: style.getPropertyValue("--faint"), line: style.getPropertyValue("--line"), net: dark ? "rgb(255 255 255 / 7%)" : "rgb(40 20 20 / 10%)" };
    (view === "map" ? drawMap : drawSurface)(canvas, prepared, ramp(), ink);
  }
  const near = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) near.delete(entry.target);
      else if (!near.has(entry.target)) { near.add(entry.target); draw(entry.target); }
    }
  }, { rootMargin: "300px" });
  function redraw() { near.forEach(draw); }
  surfaces.forEach((canvas) => watcher.observe(canvas));
  for (const choice of all("[data-view]")) {
    choice.addEventListener("click", () => {
      view = choice.dataset.view;
      all("[data-view]").forEach((other) => other.setAttribute("aria-pressed", String(other === choice)));
      redraw();
    });
  }
  addEventListener("resize", redraw);
  addEventListener("beforeprint", () => {
    root.dataset.theme = "light";
    surfaces.forEach(draw);
  });
  addEventListener("afterprint", () => setTheme(theme));

  setTheme(remembered());
  whereWeAre();
})();
