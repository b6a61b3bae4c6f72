"""What only some runs of image_text_sim_clip need: a room for each role, whose first lines say how one is added."""
