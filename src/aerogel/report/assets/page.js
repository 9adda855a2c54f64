(() => {
  "use strict";
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  const NARROW = 420; // pixels of a plot
  const NAME_HEIGHT = 22;
  const LETTER_WIDTH = 6.4; // of a label, on average

  // Plots name colours of the stylesheet; plotly wants their values.
  function themed(value, style) {
    if (typeof value === "string") {
      if (value === "inherit") return style.fontFamily;
      const name = /^var\((--[a-z-]+)\)$/.exec(value);
      return name ? style.getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, themed(v, style)]));
    }
    return value;
  }

  // Text stands behind the bars: the axis leaves it as many pixels as it needs, at any width.
  function withRoom(layout, barsWidth) {
    if (!layout.meta) return layout;
    const share = Math.max(1 - layout.meta.room / Math.max(barsWidth, 80), 0.2);
    return { ...layout, xaxis: { ...layout.xaxis, range: [0, layout.meta.most / share] } };
  }

  // On a narrow screen names stand above their bars and not beside them.
  function withNamesAbove(layout) {
    const labels = layout.yaxis.ticktext;
    const row = (layout.height - layout.margin.t - layout.margin.b) / labels.length;
    const thickness = row * (1 - (layout.bargap ?? 0.2));
    const names = labels.map((text, y) => ({
      text, y, x: 0, xref: "paper", xanchor: "left", yanchor: "bottom", yshift: thickness / 2,
      showarrow: false, borderpad: 0, font: layout.yaxis.tickfont,
    }));
    return {
      ...layout,
      height: layout.height + labels.length * NAME_HEIGHT,
      bargap: 1 - thickness / (row + NAME_HEIGHT),
      yaxis: { ...layout.yaxis, showticklabels: false, ticks: "", range: [labels.length - 0.5, -0.55] },
      annotations: [...(layout.annotations ?? []), ...names],
    };
  }

  function fitted(plot, element) {
    const width = element.clientWidth;
    const layout = { ...plot.layout, width, height: plot.height };
    const labels = layout.yaxis.ticktext;
    if (!labels) return layout;
    if (width < NARROW) return withRoom(withNamesAbove(layout), width - 16);
    const longest = Math.max(...labels.map((text) => text.length), 4);
    return withRoom(layout, width - longest * LETTER_WIDTH - 16);
  }

  async function draw() {
    const style = getComputedStyle(document.body);
    for (const plot of plots) {
      const element = document.getElementById(plot.key);
      try {
        const layout = themed(fitted(plot, element), style);
        element.style.height = layout.height + "px";
        const config = { displayModeBar: false };
        await Plotly.react(element, themed(plot.data, style), layout, config);
      } catch (error) {
        element.classList.add("failed");
        element.textContent = "This plot could not be drawn: " + error.message;
        console.error(error);
      }
    }
    const drawn = document.querySelectorAll(".js-plotly-plot").length;
    document.documentElement.dataset.drawn = String(drawn);
  }

  if (!plots.length) return;
  let waiting = 0;
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(draw, 150);
  });
  dark.addEventListener("change", draw);
  draw();
})();
