// Bundles src/ and the libraries that it uses into ../explorer.js and ../explorer.css, with the libraries' licences.
// `node build.mjs` after `npm ci`. The first line holds a digest of the sources, by which a test knows that the bundle is current.

import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { build } from "esbuild";

const here = new URL("./", import.meta.url);
const file = (name) => new URL(name, here);
const result = await build({
  absWorkingDir: here.pathname,
  entryPoints: ["src/main.js", "src/page.css"],
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  charset: "ascii",
  legalComments: "none",
  outdir: "out",
  write: false,
  metafile: true,
});

// Licences of all packages of which something is in the bundle.
const packages = new Set(
  Object.keys(result.metafile.inputs).flatMap((path) => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1] ?? []),
);
const licences = [...packages].sort().map((name) => {
  const { version, license } = JSON.parse(readFileSync(file(`node_modules/${name}/package.json`)));
  return `${name} ${version} (${license})\n\n${readFileSync(file(`node_modules/${name}/LICENSE`), "utf8").trim()}`;
});
const digest = createHash("sha256");
for (const name of [
  "package-lock.json",
  "build.mjs",
  ...readdirSync(file("src/"))
    .sort()
    .map((x) => `src/${x}`),
])
  digest.update(readFileSync(file(name)));

const head = `/* sources ${digest.digest("hex")}\n\nLicences of the libraries in this file:\n\n${licences.join(`\n\n${"-".repeat(80)}\n\n`)}\n*/\n`;
for (const { path, text } of result.outputFiles) {
  writeFileSync(
    file(path.endsWith(".css") ? "../explorer.css" : "../explorer.js"),
    path.endsWith(".css") ? text : head + text,
  );
}
