"""The paper's figures: pictures drawn, faces and prompts compared, intervals."""
