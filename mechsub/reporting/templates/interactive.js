// Makes each figure live on demand, saves it, and copies its numbers. Without this script the page is whole.
(() => {
  const isDark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function theme(config) {
    const [ink, muted, line, axis] = ["--ink", "--muted", "--line", "--axis"].map(css);
    return {
      ...config,
      mark: { tooltip: { content: "data" } },
      axis: { ...config.axis, labelColor: muted, titleColor: muted, gridColor: line, domainColor: axis, tickColor: axis },
      header: { ...config.header, labelColor: ink },
      legend: { ...config.legend, labelColor: ink, titleColor: muted },
    };
  }

  function download(name, type, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  function table(columns, rows) {
    return [columns, ...rows.map((row) => row.map((value) => value ?? ""))].map((cells) => cells.join("\t")).join("\n");
  }

  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      return false;
    }
  }

  for (const figure of document.querySelectorAll("figure")) {
    const spec = JSON.parse(figure.querySelector("script.spec").textContent);
    const { columns, texts } = spec.datasets;
    const known = columns.map((name) => texts[name]);
    const rows = spec.datasets.rows.map((row) => row.map((value, place) => (known[place] ? known[place][value] : value)));
    spec.datasets = { data: rows.map((row) => Object.fromEntries(columns.map((name, column) => [name, row[column]]))) };
    const still = figure.querySelector(".still");
    const tools = document.createElement("div");
    tools.className = "tools";
    const button = (text, action) => {
      const made = document.createElement("button");
      made.type = "button";
      made.textContent = text;
      made.addEventListener("click", () => action(made));
      tools.append(made);
      return made;
    };

    let live = null;
    async function show() {
      live?.remove();
      live = document.createElement("div");
      live.className = "live";
      still.after(live);
      const options = { mode: "vega-lite", renderer: "svg", actions: false, config: theme(spec.config) };
      await vegaEmbed(live, spec, options);
      figure.dataset.live = "yes";
    }
    button("Explore", async (made) => {
      if (live) {
        live.remove();
        live = null;
        delete figure.dataset.live;
      } else {
        await show();
      }
      still.style.display = live ? "none" : "";
      made.textContent = live ? "Back to the picture" : "Explore";
    });
    isDark.addEventListener("change", () => live && show());
    button("Save SVG", () => download(`${figure.id}.svg`, "image/svg+xml", new XMLSerializer().serializeToString(still.querySelector("svg"))));
    button("Copy numbers", async (made) => {
      const text = table(columns, rows);
      if (await copy(text)) {
        made.textContent = `Copied ${rows.length} rows`;
      } else {
        download(`${figure.id}.tsv`, "text/tab-separated-values", text);
        made.textContent = "Saved as a table";
      }
      setTimeout(() => (made.textContent = "Copy numbers"), 2000);
    });
    figure.append(tools);
  }
})();
