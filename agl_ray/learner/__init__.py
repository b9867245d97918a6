"""The learner: packing, model, FSDP, step, optimiser, checkpoint, export; supervised fine-tuning (sft). Plain torch."""
