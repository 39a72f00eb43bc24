"""Are there known vulnerabilities in the locked packages? Asks pip-audit, and says what it did not look at.

pip-audit calls it a success when the service knew none of the packages, or skipped them all; here that is no
answer, and is said so. Exit codes: 0 none known or nobody could be asked, 1 there are some.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ACCEPTED = ROOT / ".ci" / "accepted-vulnerabilities"
"""Lines `ID why`: known, and not of concern here."""
SERVICES = ("osv", "pypi")
PATIENCE = 600


def ask(tool: str, service: str) -> dict[str, Any] | str:
    """What a service knows of the locked packages, or why it could not be asked."""
    command = [tool, "--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip"]
    command += ["--vulnerability-service", service, "--timeout", "10", "--format", "json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        answer = json.loads(done.stdout)
        return answer if isinstance(answer.get("dependencies"), list) else "no list of packages"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    except ValueError:
        return (done.stderr.strip().splitlines() or ["no word"])[-1][:300]


def judge(answer: dict[str, Any], accepted: set[str]) -> tuple[int, list[str]]:
    """Packages that were looked at, and a line for each vulnerability that is not accepted."""
    looked_at, found = 0, []
    for package in answer["dependencies"]:
        if "skip_reason" in package:
            continue
        looked_at += 1
        for fault in package.get("vulns", []):
            if accepted.isdisjoint({fault["id"], *fault.get("aliases", [])}):
                fixed = ", ".join(fault.get("fix_versions", [])) or "no version yet"
                found.append(f"{package['name']} {package['version']}: {fault['id']}, mended in {fixed}")
    return looked_at, found


def main(tool: str) -> int:
    """Ask the services in turn until one has an answer."""
    lines = ACCEPTED.read_text().splitlines() if ACCEPTED.exists() else []
    accepted = {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}
    for service in SERVICES:
        answer = ask(tool, service)
        if isinstance(answer, str):
            print(f"audit: {service} could not be asked ({answer})")
            continue
        looked_at, found = judge(answer, accepted)
        if not looked_at:
            print(f"audit: {service} knew none of {len(answer['dependencies'])} packages")
            continue
        print(f"audit: {service} looked at {looked_at} of {len(answer['dependencies'])} packages")
        print("\n".join(found) or "audit: no known vulnerability")
        return 1 if found else 0
    print("audit: NOTHING WAS AUDITED: no service of advisories could be reached from here")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
