// node validate.js FILE...: the Khronos validator's issues of each file, as one JSON object by file name.
const fs = require("fs");
const validator = require("gltf-validator");

async function main(files) {
  const out = {};
  for (const file of files) {
    const report = await validator.validateBytes(new Uint8Array(fs.readFileSync(file)), { maxIssues: 0 });
    out[file] = report.issues;
  }
  console.log(JSON.stringify(out));
}
main(process.argv.slice(2));
