package dev.kd_dist.student;

/**
 * A recording as the student takes it: the middle of its spectrogram, or all of it and then silence where it is
 * shorter, divided by 255. Every level is the same as in training.
 *
 * <p>Plain Java 8, without Android; safe to call from any thread.
 */
public final class Preprocess {
    private Preprocess() {}

    /**
     * A waveform of one channel at StudentInfo.SAMPLE_RATE Hz, full scale 1, to the student's input of
     * StudentInfo.INPUT_SHAPE: StudentInfo.HEIGHT bands, each StudentInfo.WIDTH frames, from 0 to 1.
     */
    public static float[] input(float[] waveform) {
        LogMel frontEnd =
                new LogMel(
                        StudentInfo.SAMPLE_RATE,
                        StudentInfo.N_FFT,
                        StudentInfo.HOP,
                        StudentInfo.HEIGHT,
                        StudentInfo.FMIN,
                        StudentInfo.FMAX,
                        StudentInfo.DB_LOW,
                        StudentInfo.DB_HIGH);
        return frontEnd.input(waveform, StudentInfo.WIDTH);
    }
}
