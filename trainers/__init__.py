"""Fine-tuning one adapter per task with PyTorch Lightning, and multi-task jobs of stages."""
