"""A small real disk (ext4 in a file) that can be filled, or break so that it can only be read."""

import errno
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

TOOLS = ("mkfs.ext4", "e2fsck", "mount", "umount", "findmnt")


def why_not(folder: Path) -> str | None:
    """What this machine lacks for it; None when nothing."""
    if os.geteuid() != 0:
        return "a small disk in a file needs root, to be mounted"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install e2fsprogs and util-linux"
    try:
        with SmallDisk(folder / "try.img", folder / "try"):
            return None
    except (OSError, subprocess.CalledProcessError):
        return "an ext4 image cannot be mounted here"


class SmallDisk:
    """A file system of its own, mounted at `place`; a context manager."""

    def __init__(self, image: Path, place: Path, megabytes: int = 96) -> None:
        self.image, self.place, self.megabytes = image, place, megabytes

    def __enter__(self) -> "SmallDisk":
        with self.image.open("wb") as file:
            file.truncate(self.megabytes << 20)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(self.image))
        self.place.mkdir(parents=True, exist_ok=True)
        self._mount()
        return self

    def __exit__(self, *_: object) -> None:
        _run("umount", "--lazy", str(self.place))
        for image in self.image.parent.glob("*.img"):
            image.unlink()

    def fill(self) -> None:
        """Not a byte is left."""
        with self.ballast.open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        """Somebody made room."""
        self.ballast.unlink(missing_ok=True)

    @property
    def ballast(self) -> Path:
        return self.place / "ballast"

    def fail(self) -> None:
        """As when the kernel meets a fault of the device: from now on nothing can be written, open or not."""
        device = subprocess.run(
            ["findmnt", "-no", "SOURCE", str(self.place)], check=True, capture_output=True, text=True
        )
        Path("/sys/fs/ext4", Path(device.stdout.strip()).name, "trigger_fs_error").write_text("1")
        try:
            (self.place / "probe").touch()
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
        else:
            raise AssertionError("the disk can still be written")

    def mend(self) -> None:
        """The check of a disk that broke, and a new start, whatever still holds a file of it open."""
        _run("umount", "--lazy", str(self.place))
        mended = self.image.with_suffix(f".{len(list(self.image.parent.glob('*.img*')))}.img")
        shutil.copyfile(self.image, mended)
        self.image = mended
        found = subprocess.run(["e2fsck", "-p", "-f", str(self.image)], capture_output=True, check=False)
        assert found.returncode in (0, 1), found.stdout.decode()
        self._mount()

    def _mount(self) -> None:
        _run("mount", "-o", "loop,errors=remount-ro", str(self.image), str(self.place))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
