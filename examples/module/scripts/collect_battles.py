"""Make battles between three bots in the Kaggle schema, with votes for training and without for test."""
# ruff: noqa: F821 (Snakemake defines `snakemake`)

import csv
import math
import random

BOTS = {  # name → its strength, its answer
    "kind": (1.5, "Gladly! {a} plus {b} is {sum}. Do ask again."),
    "curt": (0.0, "{sum}."),
    "lost": (-1.5, "I am sorry, I do not know that."),
}
COLUMNS = ["id", "model_a", "model_b", "prompt", "response_a", "response_b"]
VOTES = ["winner_model_a", "winner_model_b", "winner_tie"]


def battle(number):
    a, b = random.randint(2, 99), random.randint(2, 99)
    bots = random.sample(sorted(BOTS), 2)
    answers = [BOTS[bot][1].format(a=a, b=b, sum=a + b) for bot in bots]
    return [number, *bots, f"What is {a} plus {b}?", *answers]


def vote(bots):
    strengths = [math.exp(BOTS[bot][0]) for bot in bots]
    winner = random.choices(VOTES, [*strengths, math.sqrt(strengths[0] * strengths[1]) / 2])[0]
    return [int(column == winner) for column in VOTES]


def write(path, rows, voted):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS + VOTES * voted)
        for number in range(rows):
            row = battle(number)
            writer.writerow(row + vote(row[1:3]) * voted)


random.seed(snakemake.params.seed)
write(snakemake.output.train, snakemake.params.train, voted=True)
write(snakemake.output.test, snakemake.params.test, voted=False)
