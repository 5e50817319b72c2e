package dev.kd_dist.student;

import java.util.Arrays;

/**
 * The log-mel front end of a student of recordings: sound to the levels that it was trained on, byte for byte.
 *
 * <p>All numbers that the constructor takes are in deployment_info.json under {@code front_end}. Sound is a
 * {@code float[]} of one channel at {@code sampleRate}, full scale 1: 16-bit numbers divided by 32768. It is not
 * resampled here and its channels are not mixed: record at {@code sampleRate} in mono (AudioRecord does), or resample
 * with a filter (not by dropping samples) and take the mean of the channels first.
 *
 * <p>Computed in double, as in training, with a Fourier transform of its own for any even number of samples; it is fast
 * where that has small prime factors, as 2048 has. An instance is for one thread at a time.
 */
public final class LogMel {
    private static final int STEPS = 255; // from dbLow to dbHigh

    private final int nFft;
    private final int hop;
    private final int mels;
    private final double dbLow;
    private final double dbHigh;
    private final double[] cos; // of 2 pi i / nFft
    private final double[] sin;
    private final double[] real; // half a frame each: even samples, odd samples
    private final double[] imaginary;
    private final double[] spectrumReal;
    private final double[] spectrumImaginary;
    private final double[] partReal; // of one column of a step of the transform
    private final double[] partImaginary;
    private final double[] power; // of one frame, by frequency

    final int[] first; // of each band: the lowest frequency in it, and the weights from there on
    final double[][] weights;

    /**
     * @param sampleRate in Hz
     * @param nFft samples of a frame, even
     * @param hop samples from one frame to the next, at most nFft
     * @param mels bands
     * @param fmin lower edge of the first band in Hz
     * @param fmax upper edge of the last band in Hz, at most half of sampleRate
     * @param dbLow decibels of level 0
     * @param dbHigh decibels of level 255
     */
    public LogMel(
            int sampleRate, int nFft, int hop, int mels, double fmin, double fmax, double dbLow, double dbHigh) {
        if (nFft < 2 || nFft % 2 != 0 || hop < 1 || hop > nFft || mels < 1) {
            throw new IllegalArgumentException(
                    "nFft must be even, hop from 1 to nFft and mels at least 1, not "
                            + nFft + ", " + hop + ", " + mels);
        }
        if (!(fmin >= 0 && fmin < fmax && fmax <= sampleRate / 2.0 && dbLow < dbHigh)) {
            throw new IllegalArgumentException(
                    "fmin must be below fmax, fmax at most half of the sample rate and dbLow below dbHigh, not "
                            + fmin + ", " + fmax + " of " + sampleRate + " Hz, " + dbLow + ", " + dbHigh);
        }
        this.nFft = nFft;
        this.hop = hop;
        this.mels = mels;
        this.dbLow = dbLow;
        this.dbHigh = dbHigh;
        cos = new double[nFft];
        sin = new double[nFft];
        for (int i = 0; i < nFft; i++) {
            cos[i] = Math.cos(2 * Math.PI * i / nFft);
            sin[i] = Math.sin(2 * Math.PI * i / nFft);
        }
        real = new double[nFft / 2];
        imaginary = new double[nFft / 2];
        spectrumReal = new double[nFft / 2];
        spectrumImaginary = new double[nFft / 2];
        partReal = new double[nFft / 2];
        partImaginary = new double[nFft / 2];
        power = new double[nFft / 2 + 1];
        first = new int[mels];
        weights = new double[mels][];
        makeBands(sampleRate, fmin, fmax);
    }

    /** How many frames a recording of so many samples has. */
    public int frames(int samples) {
        return 1 + samples / hop;
    }

    /**
     * The levels of a whole recording, 0 to 255 ({@code & 0xff} makes a byte of Java's such a number): {@code mels}
     * rows of {@code frames(waveform.length)} each, the lowest band first, as in golden/front_end.u8.
     */
    public byte[] spectrogram(float[] waveform) {
        return levels(waveform, 0, frames(waveform.length));
    }

    /**
     * What the student takes, of shape (1, 1, mels, frames): the middle {@code frames} frames of a recording, or all of
     * a shorter one with silence behind it; each value is level / 255. Frames that are not wanted are not computed.
     */
    public float[] input(float[] waveform, int frames) {
        int all = frames(waveform.length);
        int seen = Math.min(all, frames);
        byte[] levels = levels(waveform, Math.max(0, all - frames) / 2, seen);
        float[] input = new float[mels * frames];
        for (int m = 0; m < mels; m++) {
            for (int t = 0; t < seen; t++) {
                input[m * frames + t] = (levels[m * seen + t] & 0xff) / (float) STEPS;
            }
        }
        return input;
    }

    private byte[] levels(float[] waveform, int start, int count) {
        byte[] levels = new byte[mels * count];
        for (int t = 0; t < count; t++) {
            measure(waveform, (start + t) * hop - nFft / 2);
            for (int m = 0; m < mels; m++) {
                double sum = 0;
                for (int i = 0; i < weights[m].length; i++) {
                    sum += weights[m][i] * power[first[m] + i];
                }
                levels[m * count + t] = (byte) level(sum);
            }
        }
        return levels;
    }

    private int level(double sum) {
        if (Double.isNaN(sum) || Double.isInfinite(sum)) {
            throw new IllegalArgumentException("the waveform has numbers that are not finite");
        }
        double decibels = 10 * Math.log10(Math.max(sum, Math.pow(10, dbLow / 10)));
        double held = Math.max(dbLow, Math.min(decibels, dbHigh));
        return (int) Math.rint((held - dbLow) * (STEPS / (dbHigh - dbLow))); // halves to even
    }

    /** Power by frequency of the nFft samples from {@code from} on, times a Hann window; outside a recording is 0. */
    private void measure(float[] waveform, int from) {
        int half = nFft / 2;
        for (int i = 0; i < nFft; i++) {
            int at = from + i;
            double sample = at < 0 || at >= waveform.length ? 0 : waveform[at] * (0.5 - 0.5 * cos[i]);
            if (i % 2 == 0) {
                real[i / 2] = sample;
            } else {
                imaginary[i / 2] = sample;
            }
        }
        // Even samples as real parts, odd ones as imaginary parts: one complex transform of half the length has both.
        transform(0, 1, half, 0);
        for (int k = 0; k <= half; k++) {
            int one = k % half;
            int other = (half - k) % half;
            double evenReal = (spectrumReal[one] + spectrumReal[other]) / 2;
            double evenImaginary = (spectrumImaginary[one] - spectrumImaginary[other]) / 2;
            double oddReal = (spectrumImaginary[one] + spectrumImaginary[other]) / 2;
            double oddImaginary = (spectrumReal[other] - spectrumReal[one]) / 2;
            double x = evenReal + oddReal * cos[k] + oddImaginary * sin[k];
            double y = evenImaginary + oddImaginary * cos[k] - oddReal * sin[k];
            power[k] = x * x + y * y;
        }
    }

    /**
     * The discrete Fourier transform of the n numbers at start, start + step, ... of a frame, into the spectrum from
     * {@code to} on: those of every p-th number, p the smallest prime factor of n, and then their sums.
     */
    private void transform(int start, int step, int n, int to) {
        if (n == 1) {
            spectrumReal[to] = real[start];
            spectrumImaginary[to] = imaginary[start];
            return;
        }
        int p = 2;
        while (n % p != 0) {
            p++;
        }
        int length = n / p;
        for (int q = 0; q < p; q++) {
            transform(start + q * step, step * p, length, to + q * length);
        }
        int turn = nFft / n;
        for (int k = 0; k < length; k++) {
            for (int q = 0; q < p; q++) {
                partReal[q] = spectrumReal[to + q * length + k];
                partImaginary[q] = spectrumImaginary[to + q * length + k];
            }
            for (int place = k; place < n; place += length) {
                double x = 0;
                double y = 0;
                for (int q = 0; q < p; q++) {
                    int angle = q * place % n * turn;
                    x += partReal[q] * cos[angle] + partImaginary[q] * sin[angle];
                    y += partImaginary[q] * cos[angle] - partReal[q] * sin[angle];
                }
                spectrumReal[to + place] = x;
                spectrumImaginary[to + place] = y;
            }
        }
    }

    /** Triangles in equal steps of Slaney's mel scale, each of area 1 over Hz. */
    private void makeBands(int sampleRate, double fmin, double fmax) {
        double[] edge = new double[mels + 2];
        for (int m = 0; m < edge.length; m++) {
            edge[m] = hertz(mel(fmin) + (mel(fmax) - mel(fmin)) * m / (mels + 1));
        }
        double[] band = new double[nFft / 2 + 1];
        for (int m = 0; m < mels; m++) {
            int end = 0;
            first[m] = band.length;
            for (int k = 0; k < band.length; k++) {
                double frequency = (double) k * sampleRate / nFft;
                double rise = (frequency - edge[m]) / (edge[m + 1] - edge[m]);
                double fall = (edge[m + 2] - frequency) / (edge[m + 2] - edge[m + 1]);
                band[k] = 2 / (edge[m + 2] - edge[m]) * Math.max(0, Math.min(rise, fall));
                if (band[k] > 0) {
                    first[m] = Math.min(first[m], k);
                    end = k + 1;
                }
            }
            if (end == 0) {
                throw new IllegalArgumentException(
                        "band " + m + " of " + mels + " holds no frequency of a transform of " + nFft
                                + " samples; take fewer bands or a larger nFft");
            }
            weights[m] = Arrays.copyOfRange(band, first[m], end);
        }
    }

    private static double mel(double hertz) {
        return hertz < 1000 ? 3 * hertz / 200 : 15 + 27 * Math.log(hertz / 1000) / Math.log(6.4);
    }

    private static double hertz(double mel) {
        return mel < 15 ? 200 * mel / 3 : 1000 * Math.exp((mel - 15) * Math.log(6.4) / 27);
    }
}
