// What every part of the page shares: the theme, colours, units, sorting and copying. Nothing here makes a request.
"use strict";
const page = (() => {
  const root = document.documentElement;
  const probe = document.body.appendChild(document.createElement("span"));
  probe.hidden = true;

  // A CSS variable as rgb(...): canvas and plotly.js cannot read light-dark() themselves.
  const colour = (name, otherwise = "currentColor") => {
    probe.style.color = `var(${name}, ${otherwise})`;
    return getComputedStyle(probe).color;
  };

  const listeners = [];
  const onTheme = (listener) => listeners.push(listener);
  const announce = () => listeners.forEach((listener) => listener());
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const button = document.getElementById("theme");
  const setTheme = (theme) => {
    if (theme) root.dataset.theme = theme;
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Use light colours" : "Use dark colours");
    announce();
  };
  button.hidden = false;
  button.addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
  system.addEventListener("change", () => setTheme());
  setTheme();
  // Paper is white: what was drawn with dark colours is drawn again.
  let before = "";
  addEventListener("beforeprint", () => { before = root.dataset.theme || ""; setTheme("light"); });
  addEventListener("afterprint", () => { if (!before) delete root.dataset.theme; setTheme(before); });

  const digits = (value) => (Math.abs(value) >= 999.5 ? value.toFixed(0) : String(Number(value.toPrecision(3))));
  const seconds = (value) => {
    for (const [factor, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]) {
      if (Math.abs(value) >= factor) return `${digits(value / factor)} ${unit}`;
    }
    return value ? `${digits(value / 1e-9)} ns` : "0 s";
  };
  const size = (value) => {
    for (const [power, unit] of [[4, "TiB"], [3, "GiB"], [2, "MiB"], [1, "KiB"]]) {
      const scaled = value / 1024 ** power;
      if (Math.abs(scaled) >= 1) return `${scaled.toFixed(Math.abs(scaled) < 100 ? 2 : 0)} ${unit}`;
    }
    return `${value.toFixed(0)} B`;
  };

  for (const copy of document.querySelectorAll(".copy")) {
    const code = copy.parentElement.querySelector("code");
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      getSelection().selectAllChildren(code); // stays selected where the clipboard is closed to files
      try {
        await navigator.clipboard.writeText(code.textContent);
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "Selected";
      }
    });
  }

  const sortBy = (table, index, direction) => {
    const body = table.tBodies[0];
    const key = (row) => {
      const cell = row.cells[index];
      if (!("sort" in cell.dataset)) return cell.textContent;
      return cell.dataset.sort === "" ? NaN : Number(cell.dataset.sort);
    };
    const compare = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (typeof x === "string") return direction * x.localeCompare(y, "en", { numeric: true });
      return Number.isNaN(x) - Number.isNaN(y) || direction * (x - y);
    };
    body.append(...[...body.rows].sort(compare));
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, index) => {
      head.querySelector("button").addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sortBy(table, index, ascending ? 1 : -1);
      });
    });
  }

  return { colour, onTheme, seconds, size };
})();
