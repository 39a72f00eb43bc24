"""The body of `dpo config deployment`: a deployment file for one recipe."""

import json
from pathlib import Path

from tasks.recipe.read import load_recipe, shipped_recipes


def deployment_file(recipe: str) -> str:
    """The text of a deployment file that runs the recipe in the current folder every night.

    Raises:
        RecipeError: there is no such recipe, or it is not valid.
    """
    name = load_recipe(recipe).name
    whole = recipe if recipe in shipped_recipes() else str(Path(recipe).expanduser().absolute())
    folder = json.dumps(str(Path.cwd()))  # quoted as YAML quotes it, whatever the names are
    return f"""\
# Save it, edit it, and deploy it: dpo deploy --file FILE
pull: []
deployments:
  - name: {json.dumps(name)}
    entrypoint: flows.deployed.deployed
    tags: [dpo]  # alerts are for this tag
    parameters: {{recipe: {json.dumps(whole)}}}
    work_pool: {{name: dpo, job_variables: {{working_dir: {folder}}}}}
    schedules: [{{slug: every-night, cron: "0 1 * * *", timezone: UTC, active: true}}]
"""
