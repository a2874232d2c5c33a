"""The licences of what is compiled into the program, for its package: systemd/licences.py TARGET

Most licences want their text handed on with the program. Each text stands here once, under the crates it covers; a crate
that brings no text is named with its licence. The same Cargo.lock gives the same bytes.
"""

import json
import pathlib
import subprocess
import sys

NAMES = ("LICENSE", "LICENCE", "UNLICENSE", "COPYING", "COPYRIGHT", "NOTICE")


def linked(metadata):
    """The crates that the program is linked with, itself left out: no build scripts, no macros, no tests."""
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    root = metadata["resolve"]["root"]
    found, to_see = set(), [root]
    while to_see:
        crate = to_see.pop()
        if crate not in found:
            found.add(crate)
            to_see += [dependency["pkg"] for dependency in nodes[crate]["deps"]
                       if any(kind["kind"] is None for kind in dependency["dep_kinds"])
                       and not any("proc-macro" in each["kind"] for each in packages[dependency["pkg"]]["targets"])]
    return sorted((packages[crate] for crate in found - {root}), key=lambda package: (package["name"], package["version"]))


def main(target):
    metadata = json.loads(subprocess.check_output(
        ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", target]))
    covers, without = {}, []
    for package in linked(metadata):
        name = f"{package['name']} {package['version']} ({package['license']})"
        folder = pathlib.Path(package["manifest_path"]).parent
        texts = [path.read_text(errors="replace").strip() for path in sorted(folder.iterdir())
                 if path.is_file() and path.name.upper().startswith(NAMES)]
        for text in texts:
            # The same text with other line breaks is the same licence.
            covers.setdefault(" ".join(text.split()), (text, []))[1].append(name)
        if not texts:
            without.append(name)
    print("fieldpost is linked with these works of others, under their own licences.\n")
    print("SQLite is in the public domain. Rust's standard library is licensed as MIT or Apache-2.0.")
    print("Without a text of their own:\n  " + "\n  ".join(without))
    for text, names in sorted(covers.values(), key=lambda one: one[1]):
        print("\n" + "-" * 78 + "\n" + "\n".join(dict.fromkeys(names)) + "\n" + "-" * 78 + "\n\n" + text)


if __name__ == "__main__":
    main(*sys.argv[1:])
