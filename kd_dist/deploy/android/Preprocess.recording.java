package dev.kd_dist.student;

/**
 * The spectrogram of a recording as the student takes it: the middle of it, or all of it and then silence where it is
 * shorter, divided by 255.
 *
 * <p>Plain Java 8, without Android; safe to call from any thread.
 */
public final class Preprocess {
    private Preprocess() {}

    /**
     * The levels of a whole recording, StudentInfo.HEIGHT mel bands one after the other, each frame by frame, to the
     * student's input of StudentInfo.INPUT_SHAPE.
     */
    public static float[] input(byte[] levels) {
        if (levels.length == 0 || levels.length % StudentInfo.HEIGHT != 0) {
            throw new IllegalArgumentException(levels.length + " levels are not " + StudentInfo.HEIGHT + " mel bands");
        }
        int frames = levels.length / StudentInfo.HEIGHT;
        int start = Math.max(0, frames - StudentInfo.WIDTH) / 2;
        int seen = Math.min(frames, StudentInfo.WIDTH);
        float[] input = new float[StudentInfo.HEIGHT * StudentInfo.WIDTH];
        for (int band = 0; band < StudentInfo.HEIGHT; band++) {
            for (int frame = 0; frame < seen; frame++) {
                int level = levels[band * frames + start + frame] & 0xff;
                input[band * StudentInfo.WIDTH + frame] = level / 255f;
            }
        }
        return input;
    }
}
