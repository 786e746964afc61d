"""Rank the bots by the wins that the judge expects; a tie counts as half a win."""
# ruff: noqa: F821 (Snakemake defines `snakemake`)

import csv
from collections import defaultdict


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


predicted = {row["id"]: row for row in rows(snakemake.input.submission)}
wins = defaultdict(list)
for row in rows(snakemake.input.battles):
    verdict = predicted[row["id"]]
    for side in "ab":
        share = float(verdict[f"winner_model_{side}"]) + float(verdict["winner_tie"]) / 2
        wins[row[f"model_{side}"]].append(share)

means = {bot: sum(shares) / len(shares) for bot, shares in wins.items()}
with open(snakemake.output.ranking, "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(["bot", "expected_wins"])
    for bot in sorted(means, key=means.get, reverse=True):
        writer.writerow([bot, f"{means[bot]:.3f}"])
