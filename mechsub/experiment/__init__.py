"""The experiment: from a recipe to the stages that make its run directory."""
