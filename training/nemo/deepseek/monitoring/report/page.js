"use strict";
// Draws the figures in the "figures" element with plotly, in the colours of the reader's theme.
(() => {
  const PLAY_MS = 130;
  const NARROW_PX = 480;
  const LONG_NAME = 18; // characters; names that are longer do not stand side by side on a phone
  const THEMES = {
    light: {
      series: ["#2563c9", "#dd6b20", "#16876a", "#c02f4c", "#7c4dcc", "#a3195b", "#8a6d1f", "#5c6b7a"],
      text: "#1c2330", muted: "#8b93a3", panel: "#ffffff", grid: "#e8eaef", dead: "#111111",
      diverging: ["#1f5fbf", "#7fb0e6", "#f6f6f6", "#f0a07a", "#b2182b"],
      sequential: ["#f4f7fb", "#a9c8ec", "#4c8fd6", "#1d5fae", "#0b2f66"],
    },
    dark: {
      series: ["#78a9ff", "#ff9d57", "#42be95", "#ff7f93", "#b794f6", "#ff7eb6", "#d4bb55", "#9aa8b8"],
      text: "#e4e8ef", muted: "#7f8a9c", panel: "#1a1f28", grid: "#2a313d", dead: "#e6e600",
      diverging: ["#6fb1ff", "#3a6ea8", "#232933", "#b0583a", "#ff8a66"],
      sequential: ["#1f2631", "#254f86", "#3c7fd0", "#7fb5f5", "#dcebff"],
    },
  };
  const darkQuery = matchMedia("(prefers-color-scheme: dark)");
  const store = document.getElementById("figures");
  let figures = JSON.parse(store.textContent);
  const shown = new Map(); // plot element -> its state
  let theme = THEMES[darkQuery.matches ? "dark" : "light"];

  // -- colours ---------------------------------------------------------------------------------

  function withAlpha(color, alpha) {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${alpha})`;
  }

  function spread(colors, from = 0) {
    return colors.map((color, index) => [from + ((1 - from) * index) / (colors.length - 1), color]);
  }

  const ROLES = {
    diverging: () => spread(theme.diverging),
    bias: () => spread(theme.diverging),
    sequential: () => spread(theme.sequential),
    // A narrow band at the cold end for experts without a token; the middle stays at 1.
    utilisation: () => {
      const end = 0.25 / 6.5;
      const ramp = spread(theme.diverging).map(([at, color]) => [end + at * (1 - 2 * end), color]);
      return [[0, theme.dead], [end / 2, theme.dead], [end / 2, theme.diverging[0]], ...ramp,
        [1, theme.diverging[theme.diverging.length - 1]]];
    },
  };

  function resolved(value) {
    if (typeof value === "string" && value.startsWith("@")) {
      const [role, alpha] = value.slice(1).split("/");
      if (role in ROLES) return ROLES[role]();
      const color = /^\d+$/.test(role) ? theme.series[Number(role)] : theme[role];
      return color === undefined ? value : alpha === undefined ? color : withAlpha(color, alpha);
    }
    if (Array.isArray(value)) return value.map(resolved);
    if (value && typeof value === "object" && !ArrayBuffer.isView(value)) {
      const copy = {};
      for (const key of Object.keys(value)) copy[key] = key === "text" ? value[key] : resolved(value[key]);
      return copy;
    }
    return value;
  }

  // -- numbers ---------------------------------------------------------------------------------

  function bytesOf(text) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }

  // Tables from a code to the colour's place and to the value that is shown.
  function tables(scale) {
    const place = new Float32Array(256).fill(NaN);
    const value = new Float32Array(256).fill(NaN);
    for (let code = 1; code <= scale.codes + 1; code++) {
      place[code] = scale.low + ((scale.high - scale.low) * (code - 1)) / scale.codes;
      value[code] = scale.kind === "log2" ? 2 ** place[code] : place[code];
    }
    if (scale.kind === "log2") [place[0], value[0]] = [scale.below, 0];
    return { place, value };
  }

  function frame(state, index) {
    const { rows, columns } = state.figure.frames;
    state.codes ??= bytesOf(state.figure.frames.codes);
    state.tables ??= tables(state.figure.frames.scale);
    const z = [], customdata = [];
    for (let row = 0; row < rows; row++) {
      const start = (index * rows + row) * columns;
      const place = new Float32Array(columns), value = new Float32Array(columns);
      for (let column = 0; column < columns; column++) {
        const code = state.codes[start + column];
        place[column] = state.tables.place[code];
        value[column] = state.tables.value[code];
      }
      z.push(place);
      customdata.push(value);
    }
    return { z, customdata };
  }

  function layerCurve(state, layer) {
    const { values, names } = state.figure.layers;
    state.values ??= new Float32Array(bytesOf(values.bdata).buffer);
    return state.values.filter((_, at) => at % names.length === layer);
  }

  // -- drawing ---------------------------------------------------------------------------------

  function layoutOf(figure, narrow) {
    const axis = {
      automargin: true, gridcolor: theme.grid, zeroline: false, linecolor: theme.grid,
      tickfont: { size: 11 }, fixedrange: matchMedia("(pointer: coarse)").matches,
    };
    const layout = resolved(figure.layout);
    const title = (given) => ({ ...given, standoff: 8, font: { size: 12 } });
    const map = figure.data.find((trace) => trace.type === "heatmap");
    const heat = map !== undefined;
    const scale = map?.colorbar?.title?.text;
    const names = figure.data.filter((trace) => trace.showlegend !== false).map((trace) => trace.name ?? "");
    const columns = Math.max(...names.map((name) => name.length)) > LONG_NAME ? 1 : 2;
    const inColumns = narrow && !heat && names.length > columns;
    // The legend above takes nothing from the plot.
    const above = heat ? 16 : inColumns ? 17 * Math.ceil(names.length / columns) : 0;
    return {
      font: { family: "system-ui, sans-serif", size: 12, color: theme.text },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 48, r: 8, t: heat ? 24 : 8, b: heat ? 48 : 40 },
      hovermode: "x unified",
      hoverlabel: { bgcolor: theme.panel, bordercolor: theme.muted, font: { color: theme.text } },
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      showlegend: !heat,
      ...layout,
      // Beside the colour bar its title runs into the numbers, or has no room: it goes above.
      annotations: scale ? [{
        text: `colour: ${scale}`, showarrow: false, xref: "paper",
        yref: "paper", x: 1, xanchor: "right", y: 1, yanchor: "bottom", yshift: 2,
      }] : [],
      height: layout.height + above,
      legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom",
        font: { size: 11 }, itemwidth: 30,
        ...(inColumns ? { entrywidth: 1 / columns, entrywidthmode: "fraction" } : {}), ...layout.legend },
      xaxis: { ...axis, tickangle: 0, nticks: narrow ? 5 : 9, ...layout.xaxis,
        title: title(layout.xaxis.title) },
      yaxis: { ...axis, ...layout.yaxis, title: title(layout.yaxis.title) },
    };
  }

  function tracesOf(state, narrow) {
    const traces = resolved(state.figure.data);
    for (const trace of traces) {
      if (trace.type !== "heatmap") continue;
      trace.colorbar = {
        thickness: 10, outlinewidth: 0, tickfont: { size: 10 }, tickangle: 0, len: 1,
        ...trace.colorbar,
      };
      Object.assign(trace.colorbar, { title: undefined, ...(narrow ? { thickness: 8, xpad: 4 } : {}) });
    }
    if (state.figure.frames) Object.assign(traces[0], frame(state, state.index));
    if (state.figure.layers) {
      const drawn = traces[state.figure.layers.trace];
      drawn.y = layerCurve(state, state.layer);
      drawn.name = state.figure.layers.names[state.layer];
    }
    return traces;
  }

  function draw(element) {
    const state = shown.get(element);
    const narrow = element.clientWidth < NARROW_PX;
    Plotly.react(element, tracesOf(state, narrow), layoutOf(state.figure, narrow),
      { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" });
    element.dataset.drawn = "yes";
  }

  // A figure's state outlives the page's content, which a server may send anew.
  function prepare(element) {
    const figure = figures[element.dataset.plot];
    const { frames, layers } = figure;
    const before = shown.get(element);
    before?.stop?.();
    const state = { figure, index: 0, layer: 0 };
    shown.set(element, state);
    if (frames) {
      const same = before && before.index < before.figure.frames.names.length - 1
        ? frames.names.indexOf(before.figure.frames.names[before.index]) : -1;
      const box = element.closest(".panel").querySelector(".scrub");
      if (same >= 0) box.querySelector("input").value = same;
      scrubber(box, element, state);
    }
    if (layers) {
      const select = element.closest("section").querySelector(".chooser select");
      state.layer = Number(select.value);
      select.addEventListener("change", () => { state.layer = Number(select.value); draw(element); });
    }
  }

  function scrubber(box, element, state) {
    const [button, range, output] = ["button", "input", "output"].map((tag) => box.querySelector(tag));
    const { names } = state.figure.frames;
    let timer = null, waiting = false;
    const show = () => { output.textContent = names[state.index]; };
    const go = (index) => {
      state.index = index;
      range.value = index;
      show();
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => { waiting = false; draw(element); });
    };
    const stop = () => { clearInterval(timer); timer = null; button.textContent = "\u25B6"; };
    state.stop = stop;
    range.addEventListener("input", () => { stop(); go(Number(range.value)); });
    button.addEventListener("click", () => {
      if (timer !== null) return stop();
      if (state.index === names.length - 1) go(0);
      button.textContent = "\u25A0";
      timer = setInterval(() => {
        if (state.index === names.length - 1) return stop();
        go(state.index + 1);
      }, PLAY_MS);
    });
    state.index = Number(range.value);
    show();
  }

  // One figure at a time, from the top, so that the page answers meanwhile.
  function drawTab(tab) {
    const root = document.documentElement;
    const plots = [...tab.querySelectorAll(".plot")].filter((plot) => !plot.dataset.drawn);
    root.dataset.state = "drawing";
    const next = () => {
      const plot = plots.shift();
      if (plot === undefined) {
        root.dataset.state = "drawn";
        root.dataset.drawnMs ??= Math.round(performance.now());
        return;
      }
      if (!plot.isConnected) return; // newer content has come
      if (shown.get(plot)?.figure !== figures[plot.dataset.plot]) prepare(plot);
      draw(plot);
      setTimeout(next);
    };
    next();
  }

  function redraw() {
    for (const element of shown.keys()) {
      if (element.offsetParent !== null) draw(element);
      else delete element.dataset.drawn;
    }
  }

  function showTabs() {
    const tabs = [...document.querySelectorAll(".tab")];
    const picker = document.getElementById("tab");
    const showTab = (index) => {
      tabs.forEach((tab, at) => { tab.hidden = at !== index; });
      drawTab(tabs[index]);
    };
    if (picker) picker.addEventListener("change", () => showTab(Number(picker.value)));
    showTab(picker ? Number(picker.value) : 0);
  }

  // -- from a server ---------------------------------------------------------------------------

  // Of patch.py: the new value; what has not changed is the same object.
  function patched(old, patch) {
    if ("=" in patch) return patch["="];
    if ("~" in patch) {
      const [start, end, text] = patch["~"];
      return old.slice(0, start) + text + old.slice(old.length - end);
    }
    const changed = "n" in patch ? old.slice(0, patch.n) : { ...old };
    for (const [key, change] of Object.entries(patch.i ?? patch.k)) changed[key] = patched(old[key], change);
    for (const key of patch["-"] ?? []) delete changed[key];
    return changed;
  }

  // Asks for what is new and puts it in the place of what is there: what has not changed is not
  // sent again nor drawn again, and what the reader has chosen stays.
  function follow(seconds) {
    const root = document.getElementById("tabs");
    let version = "", content = null;
    const take = (news) => {
      content = patched(content, news.patch);
      ({ version } = news);
      const { title, body } = content;
      figures = content.figures;
      document.title = title;
      const plots = new Map([...root.querySelectorAll(".plot")].map((plot) => [plot.dataset.plot, plot]));
      const chosen = [...root.querySelectorAll(".chooser select")].map((select) => select.value);
      const [top, opened] = [scrollY, root.querySelector("details")?.open];
      root.innerHTML = body.join("");
      root.querySelectorAll(".chooser select").forEach((select, at) => {
        if (chosen[at] !== undefined) select.value = chosen[at];
      });
      if (opened) root.querySelector("details")?.setAttribute("open", "");
      for (const place of root.querySelectorAll(".plot")) {
        const plot = plots.get(place.dataset.plot);
        if (plot === undefined) continue;
        plots.delete(place.dataset.plot);
        place.replaceWith(plot);
        const same = shown.get(plot)?.figure === figures[plot.dataset.plot];
        prepare(plot);
        if (!same) delete plot.dataset.drawn;
      }
      for (const gone of plots.values()) { shown.delete(gone); Plotly.purge(gone); }
      scrollTo(0, top);
      showTabs();
    };
    const ask = async () => {
      try {
        const answer = await fetch(`/news?version=${version}`, { cache: "no-store" });
        const news = await answer.json();
        if (news.patch !== undefined) take(news);
        if (news.problem !== undefined && !version) root.innerHTML = `<main><p class="damage"></p></main>`;
        const place = root.querySelector(news.problem === undefined ? ".state" : ".state, .damage");
        if (place) place.textContent = news.problem ?? news.state;
      } catch {
        const place = root.querySelector(".state");
        if (place) place.textContent = "the server does not answer";
      }
      setTimeout(ask, 1000 * seconds);
    };
    ask();
  }

  darkQuery.addEventListener("change", () => {
    theme = THEMES[darkQuery.matches ? "dark" : "light"];
    redraw();
  });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  if (store.dataset.every) follow(Number(store.dataset.every));
  else showTabs();
})();
