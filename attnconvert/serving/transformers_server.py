"""`python -m attnconvert.serving.transformers_server DIR [options of transformers serve]`: transformers' own server, for a converted checkpoint.

It answers one request at a time with `generate()`. That server looks up a model's class by its name in the module `transformers`, without the auto
classes; the one name that it will ask for is put there, in this process.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Serve the checkpoint that the first argument names."""
    from transformers import AutoConfig
    from transformers.cli.serving import model_manager
    from transformers.cli.transformers import app

    from attnconvert.surgery.runtime import modeling

    name = AutoConfig.from_pretrained(sys.argv[1]).architectures[0]
    # not `import transformers`: loading a class replaces that module in sys.modules, and the server keeps the one it has
    setattr(model_manager.transformers, name, getattr(modeling, name))
    app(["serve", *sys.argv[1:]], prog_name="transformers")


if __name__ == "__main__":
    main()
