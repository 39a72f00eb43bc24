"""Bad recipes, overrides, rewards, run names and settings of the machine's services."""

import os
import socket

from tests.scenarios.bad_inputs import World, bad, lines

# --- the file ---------------------------------------------------------------------------------------------


@bad(2, "no recipe named nowhere", "no such file", "demo", "hh-harmless", "name a YAML file")
def recipe_not_found(world: World) -> list[str]:
    return ["run", "nowhere"]


@bad(2, "is a folder, not a recipe", "Name the YAML file")
def recipe_is_a_folder(world: World) -> list[str]:
    return ["run", str(world.new_folder())]


@bad(2, "recipe.yaml is not valid YAML", "line 3, column 1", "Correct that line")
def recipe_is_not_yaml(world: World) -> list[str]:
    return ["run", world.file("recipe.yaml", "name: tiny\ndata: [1, {\n")]


@bad(2, "recipe.yaml is not valid YAML", "0xff")
def recipe_is_not_text(world: World) -> list[str]:
    return ["run", world.file("recipe.yaml", b"name: tiny\n# \xff\xfe\n")]


@bad(2, "cannot be read (it has more than 1 MiB)")
def recipe_of_a_giant(world: World) -> list[str]:
    path = world.file("recipe.yaml", "")
    os.truncate(path, 10 * 2**30)
    return ["run", path]


@bad(2, "is not a mapping of fields", "Start from a shipped recipe")
def recipe_is_a_list(world: World) -> list[str]:
    return ["run", world.file("recipe.yaml", "- name\n- data\n")]


@bad(2, "is not a mapping of fields", "Start from a shipped recipe")
def recipe_is_empty(world: World) -> list[str]:
    return ["run", world.file("recipe.yaml", "")]


@bad(2, "recipe.yaml is not valid YAML", "python/object")
def recipe_runs_code(world: World) -> list[str]:
    return ["run", world.file("recipe.yaml", "name: !!python/object/apply:os.getcwd []\n")]


@bad(2, "data: Field required", "dpo config schema")
def recipe_lacks_the_data(world: World) -> list[str]:
    return world.run(data=None)


@bad(2, "name: String should match", "'a b'")
def name_with_a_space(world: World) -> list[str]:
    return world.run(name="a b")


# --- fields -----------------------------------------------------------------------------------------------


@bad(2, "there is no field modle (did you mean model?)", "dpo config schema")
def unknown_field(world: World) -> list[str]:
    return world.run(modle={"name": "x"})


@bad(2, "there is no field gate.contradicton (did you mean contradiction?)")
def unknown_gate_rule(world: World) -> list[str]:
    return world.run(gate={"contradicton": {"max_rate": 0.5}})


@bad(2, "policies.DPO.epochs: Input should be a valid number", "'many'")
def field_of_the_wrong_type(world: World) -> list[str]:
    return world.run(policies={"DPO": {"epochs": "many"}})


@bad(2, "policies.DPO.optim.learning_rate: Input should be a finite number", "nan")
def field_is_nan(world: World) -> list[str]:
    return world.run(policies={"DPO": {"optim": {"learning_rate": float("nan")}}})


@bad(2, "policies.DPO.epochs: Input should be", "policies.PPO.lam: Input should be less", "data.limit")
def three_faults_are_named_at_once(world: World) -> list[str]:
    return world.run(policies={"DPO": {"epochs": 0}, "PPO": {"method": "ppo", "lam": 2}}, data={"limit": 1})


@bad(2, "policies.DPO: batch_size 6 is not a multiple of micro_batch_size x processes = 4")
def batch_that_does_not_divide(world: World) -> list[str]:
    return world.run("--set", "policies.DPO.pack_tokens=null", policies={"DPO": {"batch_size": 6}})


@bad(2, "tokens: max_prompt_length must be below max_length")
def prompt_budget_as_large_as_all(world: World) -> list[str]:
    return world.run(tokens={"max_prompt_length": 160})


@bad(2, "evaluate.sampling.max_new_tokens 160 leaves no room in tokens.max_length")
def no_room_for_the_prompt(world: World) -> list[str]:
    return world.run(evaluate={"sampling": {"max_new_tokens": 160}})


@bad(2, "data: set exactly one of data.path", "and data.openings")
def two_sources_of_data(world: World) -> list[str]:
    return world.run(data={"openings": 24})


@bad(2, "data: set exactly one of data.path", "and data.openings")
def no_source_of_data(world: World) -> list[str]:
    return world.run(data={"path": None})


@bad(2, "reward.source is needed: the data has prompts only")
def openings_without_a_reward(world: World) -> list[str]:
    return world.run(data={"path": None, "openings": 24}, reward=None)


@bad(2, "sft.* has no effect, because sft.enabled is false")
def sft_set_and_disabled(world: World) -> list[str]:
    return world.run(sft={"epochs": 3})


@bad(2, "there is no field dpo (did you mean policies: {NAME: {method: dpo}}?)")
def recipe_with_a_method_as_a_section(world: World) -> list[str]:
    return world.run(policies=None, dpo={"epochs": 2}, ppo={"kl_coef": 0.5})


@bad(2, "policies need each other, so that none can be trained first: B → DPO → B")
def policies_in_a_cycle(world: World) -> list[str]:
    return world.run(policies={"DPO": {"start": "B"}, "B": {"method": "dpo", "reference": "DPO"}})


@bad(2, "policies.DPO.start: there is no policy 'B'; there are SFT, DPO")
def policy_that_starts_from_an_unknown_one(world: World) -> list[str]:
    return world.run(policies={"DPO": {"start": "B"}})


@bad(2, "'dpo' cannot name a policy: 'DPO' and 'dpo' differ only in case")
def policies_of_one_name(world: World) -> list[str]:
    return world.run(policies={"dpo": {"method": "dpo"}})


@bad(2, "sft: demonstrations and made_demonstrations are both set: choose one")
def two_kinds_of_demonstrations(world: World) -> list[str]:
    return world.run(sft={"enabled": True, "demonstrations": "a.jsonl", "made_demonstrations": 4})


@bad(2, "data.eval_fraction has no effect, because data.eval_path gives the evaluation set")
def evaluation_set_twice(world: World) -> list[str]:
    return world.run(data={"eval_path": "held_out.jsonl"})


# --- the objective ----------------------------------------------------------------------------------------


@bad(2, "'dpo' does not read the parameter 'tau'", "policy DPO:", "the parameters of 'dpo' are: beta")
def parameter_that_is_not_read(world: World) -> list[str]:
    return world.run(policies={"DPO": {"parameters": {"tau": 0.5}}})


@bad(2, "beta=-1.0 is outside the range of objective 'dpo'", "Choose beta")
def parameter_out_of_range(world: World) -> list[str]:
    return world.run("--set", "policies.DPO.parameters.beta=-1")


# --- overrides --------------------------------------------------------------------------------------------


@bad(2, "--set policies.DPO.epochs is not of the form a.b=value", "Write for example")
def override_without_a_value(world: World) -> list[str]:
    return world.run("--set", "policies.DPO.epochs")


@bad(2, "there is no field policies.DPO.epoch", "did you mean policies.DPO.epochs?", "dpo config schema")
def override_of_an_unknown_field(world: World) -> list[str]:
    return world.run("--set", "policies.DPO.epoch=2")


@bad(2, "--set policies.DPO.epochs=[1: the value is not valid YAML", "Correct the value")
def override_that_is_not_yaml(world: World) -> list[str]:
    return world.run("--set", "policies.DPO.epochs=[1")


@bad(2, "--set", "requires an argument", usage=True)
def override_without_anything(world: World) -> list[str]:
    return world.run("--set")


@bad(2, "No such command", "trian", usage=True)
def unknown_command(world: World) -> list[str]:
    return ["trian", "demo"]


# --- the reward -------------------------------------------------------------------------------------------


@bad(2, "no file", "absent.py", "Write 'sentiment'")
def reward_file_missing(world: World) -> list[str]:
    return world.run(reward={"source": str(world.new_folder() / "absent.py") + ":own"})


@bad(2, "has no 'own'", "own.py")
def reward_name_missing(world: World) -> list[str]:
    return world.run_reward("other = 1\n")


@bad(2, "cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'")
def reward_that_cannot_be_imported(world: World) -> list[str]:
    return world.run_reward("import no_such_package\n\ndef own(prompts, completions): return []\n")


@bad(2, "the check of reward.source failed", "returned 1 scores for 2 completions", "exactly one score")
def reward_of_the_wrong_length(world: World) -> list[str]:
    return world.run_reward("def own(prompts, completions): return [1.0]\n")


@bad(2, "the check of reward.source failed", "ZeroDivisionError", "return a list of numbers")
def reward_that_fails_on_the_empty_completion(world: World) -> list[str]:
    return world.run_reward("def own(prompts, completions): return [1 / len(c) for c in completions]\n")


@bad(4, "no pair could be made of 48 samples", "are ties", "pairs.*", adds="load-data validate-prompts")
def reward_that_is_constant(world: World) -> list[str]:
    return world.run_reward("def own(prompts, completions): return [1.0] * len(prompts)\n")


# --- demonstrations ---------------------------------------------------------------------------------------


@bad(2, "there is no file or folder", "absent.jsonl", "Check the path")
def demonstrations_missing(world: World) -> list[str]:
    return world.run(sft={"enabled": True, "demonstrations": str(world.new_folder() / "absent.jsonl")})


@bad(2, "shown.jsonl, row 2: a demonstration needs a prompt and a completion", "Correct or remove the row")
def demonstration_without_an_answer(world: World) -> list[str]:
    shown = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": " "}]
    return world.run(sft={"enabled": True, "demonstrations": world.file("shown.jsonl", lines(shown))})


# --- runs and services ------------------------------------------------------------------------------------


@bad(2, "has no unfinished run of fresh", "Start a run without --resume")
def nothing_to_resume(world: World) -> list[str]:
    return world.run("--resume", name="fresh")


@bad(2, "has no run named tiny-19990101-000000", "Newest runs: tiny-")
def resume_of_an_unknown_run(world: World) -> list[str]:
    return world.run("--resume", "tiny-19990101-000000")


@bad(2, "is of the recipe tiny, not fresh", "Name the file of the recipe tiny")
def resume_of_another_recipes_run(world: World) -> list[str]:
    some = next((world.workspace / "runs").iterdir()).name
    return world.run("--resume", some, name="fresh")


@bad(2, "no finished run named nowhere", "dpo runs")
def show_of_an_unknown_run(world: World) -> list[str]:
    return ["show", "nowhere", "--workspace", str(world.workspace)]


@bad(2, "report.json is damaged or of another version", "--resume half")
def show_of_a_damaged_report(world: World) -> list[str]:
    workspace = world.new_folder()
    (workspace / "runs" / "half").mkdir(parents=True)
    (workspace / "runs" / "half" / "report.json").write_text('{"run": {"name":')
    return ["show", "half", "--workspace", str(workspace)]


@bad(2, "is a folder, which MLflow no longer writes to", "sqlite:///")
def tracking_in_a_folder(world: World) -> list[str]:
    return world.run(tracking={"uri": str(world.new_folder())})


@bad(2, "MLflow supports no tracking URI like gopher://x", "a URI that begins with one of sqlite, http")
def tracking_of_an_unknown_kind(world: World) -> list[str]:
    return world.run(tracking={"uri": "gopher://x"})


@bad(2, "the tracking database", "not a database", "set tracking.uri to another one")
def tracking_database_is_garbage(world: World) -> list[str]:
    path = world.file("mlflow.db", "this is not a database, but it is long enough to look at" * 20)
    return world.run(tracking={"uri": f"sqlite:///{path}"})


@bad(2, "the tracking database", "cannot be used", "set tracking.uri")
def tracking_database_below_a_file(world: World) -> list[str]:
    return world.run(tracking={"uri": f"sqlite:///{world.file('plain', 'x')}/mlflow.db"})


_held: list[socket.socket] = []  # kept, so that the port stays taken while the command looks


@bad(2, "cannot be used (Address already in use)", "Set another --port")
def ui_on_a_taken_port(world: World) -> list[str]:
    taken = socket.create_server(("127.0.0.1", 0))
    _held.append(taken)
    port = str(taken.getsockname()[1])
    return ["ui", "--workspace", str(world.workspace), "--port", port, "--no-browser"]


@bad(2, "--port", "65535", usage=True)
def ui_on_an_impossible_port(world: World) -> list[str]:
    return ["ui", "--workspace", str(world.workspace), "--port", "99999"]


@bad(2, "nothing was tracked in", "Run a recipe first")
def ui_of_an_empty_workspace(world: World) -> list[str]:
    return ["ui", "--workspace", str(world.new_folder())]
