"""Draws the rooms of the package from its imports: ``python -m tests.house.picture``.

It writes the picture into ARCHITECTURE.md, between the two marks there.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping

from tests.parts.imports import ROOT, rooms

PAGE = ROOT / 'ARCHITECTURE.md'

BEGIN, END = '<!-- picture: begin -->', '<!-- picture: end -->'


def floors() -> list[list[str]]:
    """Return the rooms of each floor, from the top, as the import contracts have them."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / 'setup.cfg')
    layers = contracts['importlinter:contract:floors']['layers'].split('\n')
    return [re.split(r'\s*[|:]\s*', layer.strip()) for layer in layers if layer.strip()]


def reduced(edges: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return edges without those that a longer way makes needless."""
    return {
        name: {
            other for other in direct
            if not any(other in reached(edges, way) for way in direct - {other})
        }
        for name, direct in edges.items()
    }


def reached(edges: Mapping[str, set[str]], name: str) -> set[str]:
    """Return everything that a name leads to."""
    found: set[str] = set()
    pending = [name]
    while pending:
        for other in edges.get(pending.pop(), ()):
            if other not in found:
                found.add(other)
                pending.append(other)
    return found


def picture() -> str:
    """Return the picture, as a block that shows a Mermaid diagram."""
    lines = ['```mermaid', 'flowchart TD']
    for number, floor in enumerate(floors()):
        lines += [f'  subgraph floor{number} [" "]', f'    {" ~~~ ".join(floor)}', '  end']
    for name, others in sorted(reduced(rooms()).items()):
        lines += [f'  {name} --> {other}' for other in sorted(others)]
    return '\n'.join([*lines, '```'])


def drawn() -> str:
    """Return the picture that the page has."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    head, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f'{head}{BEGIN}\n{picture()}\n{END}{rest.partition(END)[2]}')


if __name__ == '__main__':
    main()
