"""What a program is made of, as CycloneDX 1.5 JSON: cross/sbom.py PROGRAM TARGET "COMPILER".

Every crate that is compiled into it, with version, licence and checksum: from `cargo metadata` for this target and
Cargo.lock. SQLite, which is C inside a crate, stands beside them, because that is what people ask for; Rust's standard
library too. Nothing in it depends on the machine or the time, so the same program has the same list.

Written here because the tools that do it take minutes to build, and know neither SQLite nor the standard library.
"""

import hashlib
import json
import pathlib
import re
import subprocess
import sys
import tomllib
import uuid


def main(program, target, compiler):
    metadata = json.loads(subprocess.check_output(
        ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", target]))
    checksums = {(package["name"], package["version"]): package.get("checksum")
                 for package in tomllib.loads(pathlib.Path("Cargo.lock").read_text())["package"]}
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]

    # What is linked: dependencies of the kind "normal", from the program on; not build scripts, macros or tests.
    linked, to_see = {}, [root]
    while to_see:
        crate = to_see.pop()
        if crate in linked:
            continue
        needs = [dependency["pkg"] for dependency in nodes[crate]["deps"]
                 if any(kind["kind"] is None for kind in dependency["dep_kinds"])
                 and not any("proc-macro" in each["kind"] for each in packages[dependency["pkg"]]["targets"])]
        linked[crate] = needs
        to_see += needs

    def purl(crate):
        return f"pkg:cargo/{packages[crate]['name']}@{packages[crate]['version']}"

    def component(crate):
        package = packages[crate]
        checksum = checksums.get((package["name"], package["version"]))
        return {
            "type": "library",
            "bom-ref": purl(crate),
            "name": package["name"],
            "version": package["version"],
            "purl": purl(crate),
            "licenses": [{"expression": package["license"].replace("/", " OR ")}] if package["license"] else [],
            **({"hashes": [{"alg": "SHA-256", "content": checksum}]} if checksum else {}),
        }

    sqlite = next(crate for crate in linked if packages[crate]["name"] == "libsqlite3-sys")
    header = pathlib.Path(packages[sqlite]["manifest_path"]).parent / "sqlite3" / "sqlite3.h"
    version = re.search(r'#define SQLITE_VERSION +"([\d.]+)"', header.read_text())[1]
    rust = re.search(r"[\d.]+", compiler)[0]
    others = [
        {"type": "library", "bom-ref": "sqlite", "name": "sqlite", "version": version,
         "purl": f"pkg:generic/sqlite@{version}", "cpe": f"cpe:2.3:a:sqlite:sqlite:{version}:*:*:*:*:*:*:*",
         "licenses": [{"expression": "blessing"}]},
        {"type": "library", "bom-ref": "rust-std", "name": "rust-std", "version": rust,
         "purl": f"pkg:generic/rust-std@{rust}", "licenses": [{"expression": "MIT OR Apache-2.0"}]},
    ]
    crates = sorted((crate for crate in linked if crate != root), key=purl)
    digest = hashlib.sha256(pathlib.Path(program).read_bytes()).hexdigest()
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {
            "component": {**component(root), "type": "application",
                          "hashes": [{"alg": "SHA-256", "content": digest}]},
            "properties": [{"name": "target", "value": target}, {"name": "compiler", "value": compiler}],
        },
        "components": [component(crate) for crate in crates] + others,
        "dependencies": [{"ref": purl(crate), "dependsOn": sorted(
            {purl(needed) for needed in linked[crate]}
            | ({"sqlite"} if crate == sqlite else set()) | ({"rust-std"} if crate == root else set()))}
            for crate in sorted(linked, key=purl)],
    }
    unlicensed = [each["name"] for each in bom["components"] if not each["licenses"]]
    if unlicensed:
        sys.exit(f"no licence is known for {', '.join(unlicensed)}")
    json.dump(bom, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
