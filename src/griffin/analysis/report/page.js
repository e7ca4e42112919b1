"use strict";
(() => {
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function themed(figure) {
    const ink = colour("--ink"), line = colour("--line");
    const axis = (own) => ({
      gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true, fixedrange: narrow.matches,
      ...own, title: { ...own.title, standoff: 8 },
    });
    return {
      data: figure.data.map((trace) =>
        trace.type === "scatter" && !trace.line.color ? { ...trace, line: { ...trace.line, color: ink } } : trace),
      layout: {
        margin: { l: 10, r: 12, t: 12, b: 10 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: "system-ui, sans-serif", size: 12, color: ink },
        legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
        hoverlabel: { namelength: -1 },
        showlegend: true,
        dragmode: narrow.matches ? false : "zoom",
        ...figure.layout, xaxis: axis(figure.layout.xaxis), yaxis: axis(figure.layout.yaxis),
      },
    };
  }

  function draw() {
    const settings = { responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover" };
    for (const [name, figure] of Object.entries(plots)) {
      const { data, layout } = themed(figure);
      Plotly.react(name, data, layout, settings);
    }
  }

  draw();
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
})();
