"""Fine-tune a pretrained image or text model on imbalanced classes; the result is a stock checkpoint.

    accelerate launch recipes/finetune.py                                    # micro on digits: nothing to download, a minute
    accelerate launch recipes/finetune.py --model vit_base --head etf        # any timm or transformers model
    accelerate launch recipes/finetune.py --model vit_base --dataset path/to/images --imbalance_factor 100
    accelerate launch recipes/finetune.py --model path/to/all-MiniLM-L6-v2 --dataset path/to/csv_folder
    accelerate launch recipes/finetune.py --model resnet50 --checkpoint_path weights.safetensors  # as timm leaves them
    accelerate launch recipes/finetune.py --head linear --loss cross_entropy # what to compare with
    accelerate launch recipes/finetune.py --paper                            # the method as it was published
    accelerate launch recipes/finetune.py --config settings.yaml --seed 1    # flags from a file; those of the line win
    accelerate launch recipes/finetune.py --push_to_hub --hub_model_id me/digits --hub_private_repo

The method stands in etf_adapt/commands/finetune.py; this file is `etf-adapt finetune`, for a clone. All flags: --help. Exit
codes: 2 a wrong argument or file, 1 a failed run, 3 a finished run that could not be published (the last line is the command
that publishes it); `accelerate launch` turns each into 1. Errors are one line; ETF_ADAPT_TRACEBACK=1 shows the traceback.
"""

from __future__ import annotations

import sys

from etf_adapt.commands.main import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
