"""What one alignment run found out, as data; its verdict; its table in the terminal and in Markdown.

`RunReport` holds numbers that other stages measured. Nothing is computed from models here: the verdict and
the alarms are readings of those numbers, each with its threshold beside it.
"""

import math
import re
from collections.abc import Iterable
from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import Field, JsonValue, field_validator
from rich.table import Table
from rich.text import Text

from dpo_core.config import Config
from dpo_core.stats import Estimate

KL_LIMIT_NATS = (
    10.0  # beyond this the reward of every direct method has been seen to degrade (arXiv 2406.02900)
)
KL_TIMES_PPO = 3.0  # DPO this many times as far from the reference as PPO pays too much for its reward
KL_FLOOR_NATS = 1.0  # below one nat the ratio of two KLs is mostly noise
COLLAPSE_SHARE = 0.5  # entropy or distinct-2 under this share of SFT's
LENGTH_DRIFT = 1.5  # mean length longer than SFT's by this factor, or shorter by it
ACCURACY_DROP = 0.05  # fall of the mean accuracy between the two halves of training


class RunInfo(Config):
    """Which run this is and how to get it again."""

    name: str
    recipe: str
    started_at: datetime
    finished_at: datetime
    seconds: float
    git_commit: str | None = None
    command: str
    """The exact command that reproduces the run."""
    mlflow_run_id: str | None = None
    tracking_uri: str | None = None
    python: str
    platform: str
    hardware: str
    """One line: processors or accelerators, their number and memory."""


class StageRow(Config):
    """One stage and the artifact that it left."""

    name: str
    state: Literal["ran", "cached", "skipped"]
    seconds: float
    kind: str | None = None
    rows: int | None = None
    parameters: int | None = None
    sha256: str | None = None
    parents: list[str] = Field(default_factory=list)
    """Digests of the artifacts that the stage read."""
    uri: str | None = None
    mlflow_run_id: str | None = None


class GateFinding(Config):
    """What one rule of the data gate saw: the fields of `expectations.report.Finding`."""

    rule: str
    severity: Literal["critical", "warning", "info", "off"]
    passed: bool
    skipped: bool = False
    """Whether the rule could not be judged; the message says why."""
    count: int = 0
    rate: float | None = None
    """Share of the rows that break the rule, 0 to 1."""
    observed: float | None = None
    """The number measured, for rules on the whole set."""
    threshold: float | dict[str, float] | None = None
    """The limit applied, or several by their names in the recipe."""
    rows: list[int | str] = Field(default_factory=list)
    """The first rows that break the rule: their numbers or ids."""
    message: str = ""
    remedy: str = ""

    @property
    def measured(self) -> float | None:
        """The number to hold against the limit."""
        return self.rate if self.observed is None else self.observed

    @property
    def limit(self) -> str:
        """The limit in words."""
        if isinstance(self.threshold, dict):
            return ", ".join(f"{name} {number(value)}" for name, value in self.threshold.items()) or "–"
        return "–" if self.threshold is None else number(self.threshold)


class GateRow(Config):
    """One data set at the gate."""

    subject: str
    rows: int
    dropped: int = 0
    refused: bool = False
    docs_uri: str | None = None
    findings: list[GateFinding] = Field(default_factory=list)


class PolicyRow(Config):
    """One policy, measured on the evaluation's prompts. Intervals are at 95 %, resampled by prompt."""

    name: Literal["SFT", "DPO", "PPO", "GRPO"]
    reward: Estimate
    gain: Estimate | None = None
    """Paired difference of the reward to SFT's on the same prompts."""
    kl: Estimate | None = None
    """Sequence KL to the reference in nats, estimator k1."""
    kl_k3: Estimate | None = None
    win_rate: Estimate | None = None
    """Against SFT, a tie counts half."""
    length: Estimate
    """Tokens of a completion."""
    distinct_2: float
    accuracy: Estimate | None = None
    """Preference accuracy of the implicit reward on held-out pairs."""
    entropy: float | None = None
    """Nats per token."""


class Sample(Config):
    """One prompt and what each policy answered."""

    prompt: str
    completions: dict[str, str]
    rewards: dict[str, float] = Field(default_factory=dict)


class Evaluation(Config):
    """The policies side by side."""

    reward_name: str
    reward_is_true: bool
    """False: the reward is a learned proxy, which a policy can exploit."""
    n_prompts: int
    samples_per_prompt: int
    policies: list[PolicyRow]
    samples: list[Sample] = Field(default_factory=list)

    def policy(self, name: str) -> PolicyRow | None:
        """The row of that name, None where it was not evaluated."""
        return next((row for row in self.policies if row.name == name), None)


class Cost(Config):
    """What the run used."""

    seconds: float
    seconds_by_stage: dict[str, float] = Field(default_factory=dict)
    tokens_trained: int = 0
    flops: float | None = None
    peak_memory_bytes: int | None = None


class ModelRow(Config):
    """The model that the run registered."""

    name: str
    version: str | None = None
    alias: str | None = None
    uri: str
    sha256: str


class RunReport(Config):
    """Everything that the run page, the terminal table and the Markdown artifact show."""

    run: RunInfo
    stages: list[StageRow] = Field(default_factory=list)
    gate: list[GateRow] = Field(default_factory=list)
    evaluation: Evaluation | None = None
    curves: dict[str, list[dict[str, float]]] = Field(default_factory=dict)
    """By stage: rows of `step` and metrics. Values that are not finite are dropped: JSON cannot hold them."""
    cost: Cost | None = None
    model: ModelRow | None = None
    notes: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("curves", mode="before")
    @classmethod
    def _finite(cls, curves: dict[str, list[dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
        return {
            stage: [
                {key: v for key, v in row.items() if not isinstance(v, float) or math.isfinite(v)}
                for row in rows
            ]
            for stage, rows in curves.items()
        }


class Verdict(NamedTuple):
    headline: str
    kind: Literal["good", "bad", "unclear"]
    reasons: list[str]


class Alarm(NamedTuple):
    name: str
    message: str


# ------------------------------------------------------------------------------------------------ formats


def number(value: float, signed: bool = False, scale: float | None = None) -> str:
    """Three significant digits, thousands grouped: 0.0123, 1.23, 12.3, 1,234, 1.2e-05.

    `scale` sets the decimals of numbers that stand together: with 0.118 beside it, 0.066 is 0.066.
    """
    scale = abs(value) if scale is None else scale
    if scale == 0:
        return "0"
    sign = "+" if signed else ""
    if scale < 1e-4 or scale >= 1e9:
        return f"{value:{sign}.1e}"
    decimals = max(0, 2 - math.floor(math.log10(scale)))
    return f"{value:{sign},.{min(decimals, 4)}f}"


def percent(value: float) -> str:
    """0.613 becomes 61.3%."""
    return f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """3.2 s, 4 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def scaled(value: float, unit: str, base: int = 1000) -> str:
    """A large amount with its prefix: 3.2 GiB (base 1024), 1.4 PFLOP (base 1000)."""
    prefixes = ["", "k", "M", "G", "T", "P", "E", "Z"]
    power = min(int(math.log(max(value, 1), base)), len(prefixes) - 1)
    infix = "i" if base == 1024 and power else ""
    prefix = prefixes[power].upper() if infix else prefixes[power]
    return f"{value / base**power:.3g} {prefix}{infix}{unit}"


class Cell(NamedTuple):
    """One estimate in words: "1.24" and "1.02 to 1.46"."""

    value: str
    interval: str = ""
    n: int | None = None

    def __str__(self) -> str:
        return f"{self.value} [{self.interval}]" if self.interval else self.value


class Metric(NamedTuple):
    """One line of the policy table."""

    key: str
    label: str
    hint: str
    cells: list[Cell]


_METRICS = (
    ("reward", "Reward", "mean score per prompt"),
    ("gain", "Gain over SFT", "paired difference on the same prompts"),
    ("win_rate", "Win rate", "against SFT; a tie counts half"),
    ("kl", "KL (k1), nats", "per sequence, to the reference; unbiased, may be negative"),
    ("kl_k3", "KL (k3), nats", "the same distance; estimator that is never negative"),
    ("accuracy", "Preference accuracy", "implicit reward on held-out pairs"),
    ("length", "Length, tokens", "mean completion"),
    ("distinct_2", "distinct-2", "share of word pairs that are unique; low is repetitive"),
    ("entropy", "Entropy, nats", "mean per token"),
)


def _cell(key: str, value: Estimate | float | None) -> Cell:
    def show(v: float, scale: float | None = None) -> str:
        return percent(v) if key in ("win_rate", "accuracy") else number(v, key == "gain", scale)

    if value is None:
        return Cell("–")
    if isinstance(value, Estimate):
        widest = max(abs(value.low), abs(value.high))
        return Cell(
            show(value.value, widest), f"{show(value.low, widest)} to {show(value.high, widest)}", value.n
        )
    return Cell(show(value))


def policy_metrics(evaluation: Evaluation) -> list[Metric]:
    """The policy table by line, one cell a policy; lines that nobody measured are left out."""
    lines = []
    for key, label, hint in _METRICS:
        values = [getattr(row, key) for row in evaluation.policies]
        if any(value is not None for value in values):
            lines.append(Metric(key, label, hint, [_cell(key, value) for value in values]))
    return lines


# ------------------------------------------------------------------------------------ verdict and alarms


def series(rows: Iterable[dict[str, float]], metric: str) -> tuple[list[float], list[float]]:
    """(steps, values) of one metric; rows without it are passed over."""
    points = [(row["step"], row[metric]) for row in rows if metric in row and "step" in row]
    return [x for x, _ in points], [y for _, y in points]


def start_and_end(values: list[float]) -> tuple[float, float] | None:
    """Means of the first and the last tenth (single batches are noise); None for fewer than two values."""
    if len(values) < 2:
        return None
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def verdict(report: RunReport) -> Verdict:
    """Whether DPO beat SFT: the 95 % interval of the paired gain decides, and nothing else does."""
    refused = [row.subject for row in report.gate if row.refused]
    if refused:
        return Verdict(f"The data gate refused {', '.join(refused)}", "bad", ["Nothing after the gate ran."])
    evaluation = report.evaluation
    dpo = evaluation.policy("DPO") if evaluation else None
    if evaluation is None or dpo is None:
        return Verdict("DPO was not evaluated", "unclear", ["The run has no measurement of a DPO policy."])
    if dpo.gain is None:
        return Verdict(
            "DPO was not compared with SFT", "unclear", ["The paired difference was not measured."]
        )

    gain = _cell("gain", dpo.gain)
    if dpo.gain.low > 0:
        outcome: tuple[str, Literal["good", "bad", "unclear"]] = ("DPO scores higher than SFT", "good")
    elif dpo.gain.high < 0:
        outcome = ("DPO scores lower than SFT", "bad")
    else:
        outcome = ("No difference between DPO and SFT is shown", "unclear")
    reasons = [
        f"Reward gain over SFT {gain.value}, 95% interval {gain.interval}, paired on {dpo.gain.n:,} prompts."
    ]
    if dpo.gain.low <= 0 <= dpo.gain.high:
        reasons.append("The interval contains zero: this run can neither show nor exclude an improvement.")
    if dpo.win_rate:
        reasons.append(f"Win rate against SFT {_cell('win_rate', dpo.win_rate)}.")
    for other in (evaluation.policy("PPO"), evaluation.policy("GRPO")):
        if other and other.gain:
            at_kl = f" at KL {number(other.kl.value)} nats" if other.kl else ""
            own = f" (DPO: KL {number(dpo.kl.value)} nats)" if dpo.kl else ""
            reasons.append(f"{other.name} gains {_cell('gain', other.gain)}{at_kl}{own}.")
    if evaluation.reward_is_true:
        reasons.append(f"The reward {evaluation.reward_name} is the task's true objective.")
    else:
        reasons.append(
            f"The reward {evaluation.reward_name} is a learned proxy: part of a gain may be its exploitation."
        )
    return Verdict(*outcome, reasons)


def alarms(report: RunReport) -> list[Alarm]:
    """Signs of the known failures of preference training, each with the numbers that raised it."""
    found = _training_alarms(report)
    evaluation = report.evaluation
    sft = evaluation.policy("SFT") if evaluation else None
    trained = [row for row in evaluation.policies if row.name != "SFT"] if evaluation else []
    ppo = evaluation.policy("PPO") if evaluation else None
    for row in trained:
        kl = row.kl.value if row.kl else 0.0
        if kl > KL_LIMIT_NATS:
            found.append(Alarm("KL run-away", f"{row.name} is {number(kl)} nats from the reference."))
        elif row.name == "DPO" and ppo and ppo.kl and kl > max(KL_TIMES_PPO * ppo.kl.value, KL_FLOOR_NATS):
            found.append(
                Alarm(
                    "KL run-away", f"DPO is {number(kl)} nats from the reference, PPO {number(ppo.kl.value)}."
                )
            )
        if sft is None:
            continue
        for label, own, base in (
            ("entropy", row.entropy, sft.entropy),
            ("distinct-2", row.distinct_2, sft.distinct_2),
        ):
            if own is not None and base is not None and own < COLLAPSE_SHARE * base:
                found.append(
                    Alarm(
                        "Diversity collapse", f"{row.name}'s {label} is {number(own)}, SFT's {number(base)}."
                    )
                )
        own, base = row.length.value, sft.length.value
        if own > LENGTH_DRIFT * base or own * LENGTH_DRIFT < base:
            found.append(
                Alarm(
                    "Length drift", f"{row.name} writes {number(own)} tokens on average, SFT {number(base)}."
                )
            )
    for gate in report.gate:
        failed = [f for f in gate.findings if not f.passed and f.severity in ("critical", "warning")]
        if failed:
            rules = ", ".join(
                f"{f.rule} ({f.severity}{f', {f.count:,} rows' if f.count else ''})" for f in failed
            )
            found.append(Alarm("Data gate", f"{gate.subject}: {rules}."))
    return found


def _training_alarms(report: RunReport) -> list[Alarm]:
    found = []
    dpo = report.evaluation.policy("DPO") if report.evaluation else None
    for rows in report.curves.values():
        chosen = start_and_end(series(rows, "logps/chosen")[1])
        reward = start_and_end(series(rows, "rewards/chosen")[1])
        if chosen and reward and chosen[1] < chosen[0] and reward[1] < 0:
            found.append(
                Alarm(
                    "Likelihood displacement",
                    f"log p(chosen) fell from {number(chosen[0])} to {number(chosen[1])} and ended below "
                    f"the reference (implicit reward {number(reward[1])}): preferred answers became rarer.",
                )
            )
        accuracies = series(rows, "eval_rewards/accuracies")[1] or series(rows, "rewards/accuracies")[1]
        half = len(accuracies) // 2
        if half and dpo and dpo.gain and dpo.gain.value > 0:
            early, late = sum(accuracies[:half]) / half, sum(accuracies[half:]) / (len(accuracies) - half)
            if late < early - ACCURACY_DROP:
                message = f"The reward rose while accuracy fell from {percent(early)} to {percent(late)}."
                found.append(Alarm("Reward without accuracy", message))
    if dpo and dpo.accuracy and dpo.gain and dpo.gain.value > 0 and dpo.accuracy.high < 0.5:
        message = f"The reward rose, yet held-out preference accuracy is {_cell('accuracy', dpo.accuracy)}."
        found.append(Alarm("Reward without accuracy", message))
    return found


# ------------------------------------------------------------------------------------ terminal, Markdown


def stage_size(stage: StageRow) -> str:
    """What the artifact holds: "1,200 rows", "134,515,008 parameters", or an en dash."""
    sizes = [(stage.rows, "rows"), (stage.parameters, "parameters")]
    return ", ".join(f"{count:,} {unit}" for count, unit in sizes if count is not None) or "–"


def terminal_table(report: RunReport) -> Table:
    """The end of a run in 80 columns: verdict, stages with times, policies, alarms."""
    headline, kind, reasons = verdict(report)
    page = Table.grid(padding=(0, 0))
    colour = {"good": "green", "bad": "red", "unclear": "yellow"}[kind]
    page.add_row(Text(headline, style=f"bold {colour}"))
    page.add_row(Text(reasons[0]))
    stages = Table(title=Text(f"Stages of {report.run.name}"), title_justify="left")
    for name in ("Stage", "State", "Time", "Artifact"):
        stages.add_column(name, justify="right" if name == "Time" else "left")
    for stage in report.stages:
        stages.add_row(Text(stage.name), stage.state, duration(stage.seconds), stage_size(stage))
    stages.add_section()
    stages.add_row("total", "", duration(report.run.seconds), "")
    page.add_row(stages)
    if report.evaluation:
        policies = Table(title="Policies (95% interval)", title_justify="left")
        policies.add_column("")
        for row in report.evaluation.policies:
            policies.add_column(row.name, justify="right")
        for metric in policy_metrics(report.evaluation):
            policies.add_row(
                metric.label,
                *(Text(f"{c.value}\n{c.interval}".strip()) for c in metric.cells),
                end_section=True,
            )
        page.add_row(policies)
    for alarm in alarms(report):
        page.add_row(Text(f"! {alarm.name}: {alarm.message}", style="yellow"))
    return page


def _plain(text: object) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no cell border."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#~$])", r"\\\1", flat.replace("&", "&amp;"))


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_plain(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(report: RunReport) -> str:
    """The report as GitHub Markdown, for a Prefect artifact: no samples, no curves."""
    headline, _, reasons = verdict(report)
    raised = [f"**{_plain(alarm.name)}**: {_plain(alarm.message)}" for alarm in alarms(report)]
    parts = [f"# {_plain(headline)}", "\n".join(f"- {_plain(reason)}" for reason in reasons)]
    if raised:
        parts += ["## Alarms", "\n".join(f"- {line}" for line in raised)]
    if report.evaluation:
        lines = [[metric.label, *map(str, metric.cells)] for metric in policy_metrics(report.evaluation)]
        parts += ["## Policies", "Brackets hold 95% intervals, resampled by prompt."]
        parts.append(_markdown_table(["", *(row.name for row in report.evaluation.policies)], lines))
    if report.stages:
        stages = [
            [stage.name, stage.state, duration(stage.seconds), stage_size(stage), (stage.sha256 or "–")[:12]]
            for stage in report.stages
        ]
        parts += ["## Stages", _markdown_table(["Stage", "State", "Time", "Artifact", "Digest"], stages)]
    if report.gate:
        gate = [
            [row.subject, f"{row.rows:,}", f"{row.dropped:,}", "refused" if row.refused else "passed", rule]
            for row in report.gate
            for rule in [", ".join(f.rule for f in row.findings if not f.passed) or "none"]
        ]
        head = ["Data", "Rows", "Dropped", "Gate", "Rules not met"]
        parts += ["## Data gate", _markdown_table(head, gate)]
    # The fence must be longer than any run of backticks inside it.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", report.run.command)), default=0))
    parts += ["## Reproduce", f"{fence}sh\n{report.run.command}\n{fence}"]
    return "\n\n".join(parts) + "\n"
