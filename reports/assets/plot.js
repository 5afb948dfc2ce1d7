// Draws the plotly.js charts, one after another, and again when the theme changes.
"use strict";
(() => {
  // Every string that starts with "--" names a CSS variable and becomes its colour.
  const coloured = (value) => {
    if (typeof value === "string") return value.startsWith("--") ? page.colour(value) : value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(coloured);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
    }
    return value;
  };
  const axis = (own = {}) => ({
    gridcolor: "--rule", linecolor: "--rule", zerolinecolor: "--rule", automargin: true, fixedrange: true, ...own,
    title: { ...own.title, font: { size: 12 }, standoff: 6 },
  });
  const layout = (own) => coloured({
    ...own,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    margin: { l: 48, r: 8, t: 8, b: 36 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "--muted" },
    hoverlabel: { bgcolor: "--raised", bordercolor: "--rule", font: { color: "--ink", size: 12 } },
    xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
  });
  const charts = [...document.querySelectorAll(".plot")].map((place) => ({
    place, figure: JSON.parse(place.nextElementSibling.textContent),
  }));
  const draw = ({ place, figure }) =>
    Plotly.react(place, figure.data.map(coloured), layout(figure.layout), { displayModeBar: false, responsive: true })
      .then(() => { place.dataset.drawn = "true"; });
  const next = (index) => {
    if (index < charts.length) draw(charts[index]).then(() => setTimeout(next, 0, index + 1));
  };
  next(0);
  page.onTheme(() => charts.filter(({ place }) => place.dataset.drawn).forEach(draw));
})();
