"use strict";
(function () {
  let drawings = {};
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const settings = { responsive: true, displayModeBar: false, displaylogo: false, scrollZoom: false };
  let printing = false;

  function color(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  function plain(text) { // plotly reads some tags in titles
    return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  }

  function chosen(name) {
    return drawings[name].selects.map(function (_, number) {
      const select = document.querySelector('select[data-figure="' + name + '"][data-number="' + number + '"]');
      return select ? Number(select.value) : 0;
    });
  }

  function themed(layout) {
    const text = printing ? "#000000" : color("--text");
    const grid = printing ? "#dddddd" : color("--grid");
    const made = Object.assign({}, layout, {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      uirevision: "kept", // traces that were hidden stay hidden when the figure is drawn again
      font: { family: "system-ui, sans-serif", size: window.innerWidth < 600 && !printing ? 10 : 12, color: text },
      hoverlabel: { bgcolor: color("--back"), bordercolor: color("--line"), font: { color: text, size: 12 } },
    });
    ["xaxis", "yaxis"].forEach(function (axis) {
      made[axis] = Object.assign({ gridcolor: grid, zerolinecolor: grid, fixedrange: true }, made[axis]);
      if (axis === "xaxis" && made[axis].zerolinewidth) made[axis].zerolinecolor = color("--quiet");
    });
    return made;
  }

  function cells(trace) { // what is shown of each cell
    return trace.z.map(function (row, y) {
      return row.map(function (value, x) {
        return trace.meta.rows[y] + ", " + trace.meta.columns[x] + ": " + (value === null ? "none" : value.toFixed(3));
      });
    });
  }

  function built(name) {
    const drawing = drawings[name];
    const picks = chosen(name);
    let data = drawing.figure.data.map(function (trace) { return Object.assign({}, trace); });
    let layout = Object.assign({}, drawing.figure.layout);
    const key = picks.filter(function (_, number) { return !drawing.selects[number].axis; }).join("|");
    const variant = key === "" ? undefined : drawing.variants[key];
    if (variant) {
      data = variant.data.map(function (trace, index) { return Object.assign({}, data[index], trace); });
      layout = Object.assign(layout, variant.layout);
    }
    drawing.selects.forEach(function (select, number) {
      if (!select.axis) return;
      data.forEach(function (trace) { trace[select.axis] = trace.meta[picks[number]]; });
      const axis = select.axis + "axis";
      layout[axis] = Object.assign({}, layout[axis], { title: { text: plain(select.options[picks[number]]) } });
    });
    data.forEach(function (trace) {
      if (trace.type === "heatmap") trace.text = cells(trace);
      delete trace.meta;
    });
    return { data: data, layout: themed(layout) };
  }

  function draw(name, width) {
    const element = document.getElementById("figure-" + name);
    const made = built(name);
    if (width) made.layout.width = width;
    element.style.minHeight = made.layout.height + "px";
    return Plotly.react(element, made.data, made.layout, settings).then(function () { makeRoom(element, made); });
  }

  function makeRoom(element, made) { // for a legend of several lines, which would take it from the plot
    const legend = element.querySelector(".legend");
    const more = legend ? Math.round(legend.getBBox().height) - 30 : 0;
    if (more <= 0) return undefined;
    const height = made.layout.height + more;
    element.style.minHeight = height + "px";
    return Plotly.react(element, made.data, Object.assign({}, made.layout, { height: height }), settings);
  }

  function drawAll(width) {
    Object.keys(drawings).forEach(function (name) { draw(name, width); });
  }

  function copy(button) {
    const text = button.parentElement.querySelector("pre");
    const range = document.createRange();
    range.selectNodeContents(text);
    const selection = window.getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    const done = function () { button.textContent = "Copied"; };
    if (navigator.clipboard) navigator.clipboard.writeText(text.textContent).then(done, function () {});
    else if (document.execCommand("copy")) done();
  }

  function renew() {
    drawings = JSON.parse(document.getElementById("drawings").textContent);
    drawAll();
  }

  document.addEventListener("change", function (event) {
    if (event.target.matches("select[data-figure]")) draw(event.target.dataset.figure);
  });
  document.addEventListener("click", function (event) {
    if (event.target.matches("button.copy")) copy(event.target);
  });
  document.addEventListener("renewed", renew); // a live page has got other figures
  dark.addEventListener("change", function () { drawAll(); });
  window.addEventListener("beforeprint", function () { printing = true; drawAll(680); });
  window.addEventListener("afterprint", function () { printing = false; drawAll(); });
  renew();
})();
